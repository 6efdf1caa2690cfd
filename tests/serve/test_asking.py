"""Bodies: every field is understood or refused by its name."""

from typing import Any

import pytest

from patchbay.serve import asking
from patchbay.serve.guard import Refusal

PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


def refused(read: Any, body: Any) -> Refusal:
    with pytest.raises(Refusal) as found:
        read(body)
    assert found.value.status == 400
    return found.value


def test_what_nothing_says_is_openais_own() -> None:
    asked = asking.completion(PLAIN)
    assert (asked.n, asked.n_new, asked.stop, asked.logprobs, asked.echo, asked.stream) == (
        1,
        16,
        (),
        None,
        False,
        False,
    )
    assert asked.sampling == asking.Sampling(temperature=1.0, top_p=1.0)
    assert asking.completion(PLAIN | dict.fromkeys(("n", "max_tokens", "temperature", "stop", "seed"))) == asked
    chat = asking.chat(CHAT)
    assert (chat.n_new, chat.logprobs, chat.prompts) == (None, None, [CHAT["messages"]])


def test_every_field_reaches_its_place() -> None:
    body = PLAIN | {
        "prompt": ["a", "b"], "n": 2, "best_of": 2, "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"7": -100}, "seed": 5, "stop": ["x", "y", "x"], "logprobs": 2,
        "echo": True, "stream": True, "stream_options": {"include_usage": True}, "user": "me",
        "patchbay": {"knobs": [{"name": "k", "strength": 2}, {"name": "l"}]},
    }  # fmt: skip
    asked = asking.completion(body)
    sampling = asking.Sampling(0.0, 0.5, 4, 0.1, 1.0, -1.0, ((7, -100.0),))
    knobs = (("k", 2.0), ("l", None))
    assert asked == asking.Asked("tiny", False, ["a", "b"], sampling, 2, 3, 5, ("x", "y"), 2, True, True, True, knobs)
    chat = asking.chat(CHAT | {"logprobs": True, "top_logprobs": 3, "max_completion_tokens": 9, "metadata": {"a": "b"}})
    assert (chat.logprobs, chat.n_new) == (3, 9)
    parts = [{"role": "user", "name": "me", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert asking.chat(CHAT | {"messages": parts}).prompts == [[{"role": "user", "content": "ab", "name": "me"}]]


@pytest.mark.parametrize(
    ("more", "about"),
    [
        ({"temperatur": 1}, "temperatur"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": 10**30}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        ({"model": None}, "model"),
        ({"patchbay": {"knob": []}}, "patchbay"),
        ({"patchbay": {"knobs": [{"strength": 1}]}}, "patchbay.knobs"),
        ({"patchbay": {"knobs": [{"name": "k", "strength": 1e300}]}}, "the strength of knob 'k'"),
        ({"seed": 1.5}, "seed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(more: dict[str, Any], about: str) -> None:
    assert refused(asking.completion, PLAIN | more).about == about


@pytest.mark.parametrize(
    "more",
    [
        {"messages": []},
        {"messages": "x"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {"top_logprobs": 2},
        {"max_tokens": 2, "max_completion_tokens": 3},
        {"logprobs": 3},
        {"prompt": "x"},
        {"echo": True},
    ],
)
def test_chats_that_are_not_understood_are_refused(more: dict[str, Any]) -> None:
    refused(asking.chat, CHAT | more)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "service_tier": "auto",
    }
    assert asking.chat(CHAT | nothing) == asking.chat(CHAT)
    assert refused(asking.chat, CHAT | {"store": 0}).about == "store"


def test_a_near_miss_is_named() -> None:
    assert "did you mean 'temperature'" in refused(asking.completion, PLAIN | {"temprature": 1}).message
    assert len(refused(asking.completion, PLAIN | {"x" * 5000: 1}).message) < 300
    for body in (None, [], 3, "x"):
        assert "JSON object" in refused(asking.completion, body).message
