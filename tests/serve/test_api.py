"""The protocol as OpenAI's own client reads it, over real sockets: every answer is that of the same request alone."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch

import patchbay as pb
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Guard, Keys
from patchbay.serve.named import Named
from tests.tolerance import close

PROMPT = "The capital of Lolavia is"
LONGER = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ROOM = Room(batch_tokens=1024, rows=24, queue=24, chunk=16)


@dataclass
class Served:
    """A server of `tiny` with knobs, and what asks it."""

    model: pb.Model
    engine: Engine
    client: openai.OpenAI
    web: httpx.Client
    knobs: dict[str, Any]

    def text(self, **options: Any) -> str:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | options
        return self.client.completions.create(**asked).choices[0].text

    def post(self, body: Any, path: str = "/v1/completions") -> httpx.Response:
        return self.web.post(path, json=body)


def knobs(model: pb.Model) -> dict[str, Any]:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    made = {f"h{i}": pb.turn.scale(f"L{i % model.n_layers}.H{i % 4}", -1.0) for i in range(13)}
    made["text"] = pb.turn.scale("L1.H1", 0.0)
    made["push"] = pb.Knob("push", [pb.add(model.port("L2.resid_out"), vector, positions="generated")], 1.0)
    made["huge"] = pb.Knob("huge", [pb.add(model.port("L0.resid_out"), torch.full((model.d_model,), 3e38))], 1.0)
    made["cut"] = pb.Knob("cut", [pb.block(model.port("L1.H1.pattern"), query="generated", key=[1])], 1.0)
    return made


@pytest.fixture(scope="module")
def served(listening: Callable[..., int]) -> Iterator[Served]:
    model = pb.load("tiny")
    named = Named(model, "tiny", knobs(model))
    engine, keys = Engine(model, ROOM).start(), Keys()
    port = listening(Guard(Api(engine, named).router(), keys, public=["/healthz"]))
    base, head = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {keys.token}"}
    with (
        httpx.Client(base_url=base, headers=head, trust_env=False, timeout=60) as web,
        openai.OpenAI(
            base_url=f"{base}/v1", api_key=keys.token, max_retries=0, http_client=httpx.Client(trust_env=False)
        ) as client,
    ):
        yield Served(model, engine, client, web, dict(named.knobs))
    engine.close()


def alone(served: Served, prompt: str, n: int, *turned: Any) -> str:
    with served.model.edited(*turned) if turned else served.model.session():
        return str(served.model.generate(prompt, n, new_only=True))


def test_a_completion_is_what_the_model_says(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0)
    [choice] = answer.choices
    assert choice.text == alone(served, PROMPT, 6)
    assert answer.usage is not None
    n = len(served.model.encode(PROMPT)[0])
    assert answer.usage.prompt_tokens == n
    assert answer.usage.total_tokens == n + answer.usage.completion_tokens
    assert answer.object == "text_completion"
    assert choice.finish_reason in ("stop", "length")


def test_models_are_listed_with_their_knobs(served: Served) -> None:
    listed = [one.id for one in served.client.models.list()]
    assert listed[0] == "tiny"
    assert set(listed[1:]) == {f"tiny+{name}" for name in served.knobs}
    assert served.client.models.retrieve("tiny+text@2").id == "tiny+text@2"
    with pytest.raises(openai.NotFoundError, match="this server has tiny with the knobs"):
        served.client.models.retrieve("gpt-4")


def test_sixteen_clients_with_sixteen_knobs_get_what_each_gets_alone(served: Served) -> None:
    """Prompts of two lengths, each under another knob at another strength, all at once, half of them streamed."""
    names = [name for name in served.knobs if name != "huge"]
    prompts = [PROMPT if i % 3 else LONGER for i in range(16)]
    strengths = [0.5 + i / 4 for i in range(16)]
    before = served.engine.counts.steps

    def ask(i: int) -> str:
        asked = dict(model=f"tiny+{names[i]}@{strengths[i]}", prompt=prompts[i], max_tokens=12, temperature=0)
        if i % 2:
            return "".join(piece.choices[0].text for piece in served.client.completions.create(**asked, stream=True))
        return served.client.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    expected = [alone(served, prompts[i], 12, served.knobs[names[i]].at(strengths[i])) for i in range(16)]
    assert found == expected
    assert len(set(found)) > 4
    assert served.engine.counts.steps - before < 100  # 16 x 12 tokens, in far fewer runs of the model


def test_knobs_in_the_body_are_those_of_the_name(served: Served) -> None:
    body = {"patchbay": {"knobs": [{"name": "text", "strength": 0}, {"name": "push", "strength": 2}]}}
    answer = served.client.completions.create(model="tiny", prompt=LONGER, max_tokens=6, temperature=0, extra_body=body)
    assert answer.choices[0].text == served.text(model="tiny+text@0+push@2", prompt=LONGER, max_tokens=6)
    assert answer.choices[0].text == alone(served, LONGER, 6, served.knobs["text"].at(0), served.knobs["push"].at(2))
    assert answer.model_extra is not None
    assert answer.model_extra["patchbay"]["knobs"] == [{"name": "text", "strength": 0}, {"name": "push", "strength": 2}]
    assert served.text(model="tiny+text", prompt=LONGER, max_tokens=2) == " Grerum."  # as the README has it
    assert served.text(prompt=LONGER, max_tokens=2) == " Budurg."
    with pytest.raises(openai.BadRequestError, match="no knob 'tex'.*did you mean 'text'"):
        served.text(model="tiny+tex")
    for wrong in ("tiny+text@", "tiny+text@nan", "tiny+text@2@3", "tiny+", "tiny+text@1e999"):
        with pytest.raises(openai.BadRequestError):
            served.text(model=wrong)
    with pytest.raises(openai.NotFoundError):
        served.text(model="gpt-4")


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    asked: dict[str, Any] = dict(model="tiny+push", prompt=LONGER, max_tokens=10, seed=3, n=2, logprobs=2)
    whole = served.client.completions.create(**asked)
    texts, tokens, ends, usage = ["", ""], [[], []], {}, []
    for piece in served.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage += [piece.usage] if piece.usage else []
        for choice in piece.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.token_logprobs  # type: ignore[union-attr]
        assert ends[choice.index] == choice.finish_reason
    assert usage == [whole.usage]
    lines = served.post({**asked, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]


def test_seeds_and_choices(served: Served) -> None:
    asked: dict[str, Any] = dict(model="tiny", prompt="The", max_tokens=10, temperature=1.5)
    drawn = [[c.text for c in served.client.completions.create(**asked, n=4, seed=seed).choices] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4
    first = served.client.completions.create(**asked, seed=1).choices[0].text
    assert first == drawn[0][0]  # a choice does not hang on how many there are
    free = [served.client.completions.create(**asked) for _ in range(2)]
    again = served.client.completions.create(**asked, seed=free[0].model_extra["patchbay"]["seed"])  # type: ignore[index]
    assert free[0].choices[0].text == again.choices[0].text != free[1].choices[0].text


def test_stops_end_the_text_before_them(served: Served) -> None:
    whole = served.text(prompt=LONGER, max_tokens=12)
    stop = whole[4:7]
    answer = served.client.completions.create(
        model="tiny", prompt=LONGER, max_tokens=12, temperature=0, stop=[stop, "never"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def law(served: Served, ids: list[int], *turned: Any) -> torch.Tensor:
    with served.model.edited(*turned) if turned else served.model.session(), torch.no_grad():
        return torch.log_softmax(served.model.hf(torch.tensor([ids])).logits[0].double(), -1)


def test_echo_tells_the_log_probabilities_of_the_prompt(served: Served) -> None:
    """What an evaluation by log-likelihood reads: those of the prompt's own tokens, under a knob, of a prompt run in pieces."""
    knob = served.knobs["text"].at(0.0)
    ids = served.model.encode(LONGER)[0]
    assert len(ids) > ROOM.chunk
    for n_new in (0, 1):
        answer = served.client.completions.create(
            model="tiny+text@0", prompt=[ids], max_tokens=n_new, temperature=0, logprobs=1, echo=True
        )  # type: ignore[call-overload]
        [choice] = answer.choices
        found = choice.logprobs.token_logprobs
        assert (found[0], len(found)) == (None, len(ids) + n_new)
        logp = law(served, ids, knob)
        assert close(found[1 : len(ids)], [float(logp[at, token]) for at, token in enumerate(ids[1:])], of=logp)
        assert choice.text.startswith(served.model.decode(ids)[:20])
        for at in range(1, len(ids)):
            top = choice.logprobs.top_logprobs[at]
            assert close(max(top.values()), float(logp[at - 1].max()), of=logp)
            assert found[at] in top.values()
        assert answer.usage.completion_tokens == n_new


def test_log_probabilities_of_a_chat(served: Served) -> None:
    served.model.tokenizer.chat_template = TEMPLATE  # type: ignore[union-attr]
    try:
        messages: Any = [{"role": "user", "content": PROMPT}]
        asked: dict[str, Any] = dict(
            model="tiny", messages=messages, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
        )
        answer = served.client.chat.completions.create(**asked)
        [choice] = answer.choices
        assert choice.message.content == alone(served, messages, 5)
        [ids] = served.model.encode(messages)
        row = served.model.generate([ids], 5)[0]
        logp = law(served, row)
        rows = choice.logprobs.content  # type: ignore[union-attr]
        assert rows is not None
        expected = [float(logp[at - 1, row[at]]) for at in range(len(ids), len(row))]
        assert close([one.logprob for one in rows], expected, of=logp)
        assert all(len(one.top_logprobs) == 2 and bytes(one.bytes or []).decode() == one.token for one in rows)
        pieces = list(served.client.chat.completions.create(**asked, stream=True))
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
        free = served.client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert free.choices[0].message.content
    finally:
        served.model.tokenizer.chat_template = None  # type: ignore[union-attr]


def test_a_chat_without_a_template_is_refused_with_the_reason(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="template"):
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_several_prompts_in_one_request(served: Served) -> None:
    answer = served.client.completions.create(
        model="tiny", prompt=[PROMPT, LONGER, PROMPT], n=2, max_tokens=4, temperature=0
    )
    one, other = alone(served, PROMPT, 4), alone(served, LONGER, 4)
    assert [choice.text for choice in answer.choices] == [one, one, other, other, one, one]
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_too_long_prompts_are_refused_with_numbers(served: Served) -> None:
    longest = served.model.longest_prompt
    assert longest is not None
    with pytest.raises(openai.BadRequestError, match=f"{longest + 1} tokens, the model takes {longest}"):
        served.text(prompt=[5] * (longest + 1))
    with pytest.raises(
        openai.BadRequestError,
        match=f"{longest} tokens and 1 new ones.*{longest + 1} in all; the model takes {longest}",
    ):
        served.text(prompt=[5] * longest, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="this server holds 1024"):
        served.text(prompt=[5] * (longest - 1), max_tokens=1, n=16)
    with pytest.raises(openai.BadRequestError, match="token ids"):
        served.text(prompt=[10**6])


def test_a_knob_that_breaks_the_numbers_ends_its_own_request_alone(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(served.text, prompt=LONGER, max_tokens=12)
        for more in ({}, {"stream": True}):
            with pytest.raises(openai.BadRequestError, match="no numbers"):
                served.client.completions.create(model="tiny+huge", prompt=LONGER, max_tokens=4, **more)  # type: ignore[call-overload]
        assert good.result() == alone(served, LONGER, 12)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_client_that_leaves_frees_its_row(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one token: the turn after the one in which it left runs without it."""
    left = served.model.longest_prompt - len(served.model.encode("The")[0])  # type: ignore[operator]
    bias = {str(token): -100 for token in served.engine.ends}
    body = {"model": "tiny", "prompt": "The", "max_tokens": left, "logit_bias": bias, "n": 4}
    turn, freed = served.engine.turn, []

    def turn_once_it_left() -> None:
        if lines := list(served.engine.lines):
            wait_for(lambda: all(line.work.gone for line in lines))
            freed.append(len(lines))
        turn()

    monkeypatch.setattr(served.engine, "turn", turn_once_it_left)
    for stream in (True, False):
        steps = served.engine.counts.steps
        with httpx.Client(base_url=served.web.base_url, headers=served.web.headers, trust_env=False) as one:
            if stream:
                with one.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    one.post("/v1/completions", json=body, timeout=0.15)
        wait_for(lambda: served.engine.idle and bool(freed))
        assert freed == [4]
        assert served.engine.counts.steps - steps == 1
        assert served.engine.joined.cache is None
        freed.clear()


def test_a_full_line_is_429(served: Served) -> None:
    release = threading.Event()
    turn = served.engine.turn
    served.engine.turn = lambda: (release.wait(20), turn())[1]  # type: ignore[method-assign, assignment]
    try:
        with ThreadPoolExecutor(24) as pool:
            running = [pool.submit(served.post, {"model": "tiny", "prompt": "The", "max_tokens": 1}) for _ in range(24)]
            wait_for(lambda: len(served.engine.waiting) == 24)
            answer = served.post({"model": "tiny", "prompt": "The", "max_tokens": 1})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            release.set()
            assert [one.result().status_code for one in running] == [200] * 24
    finally:
        release.set()
        served.engine.turn = turn  # type: ignore[method-assign]


def test_an_error_of_the_servers_own_has_an_id_and_the_next_request_is_served(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = served.engine.joined.step
    monkeypatch.setattr(type(served.engine.joined), "step", lambda self, tokens: 1 / 0)
    answer = served.post({"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0})
    assert answer.status_code == 500
    id = answer.json()["error"]["code"]
    assert re.fullmatch("[0-9a-f]{12}", id)
    assert id in caplog.text
    stream = served.post({"model": "tiny", "prompt": LONGER, "max_tokens": 5, "temperature": 0, "stream": True})
    assert stream.status_code == 200
    assert '"type": "server_error"' in stream.text
    monkeypatch.undo()
    assert step is not None
    assert served.text(max_tokens=5) == alone(served, PROMPT, 5)


def test_the_log_holds_no_prompt(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        served.text(prompt="Kate asked Emma about the", model="tiny+text@2")
    rows = [json.loads(row.message) for row in caplog.records if row.name == "patchbay.requests"]
    assert rows[-1]["knobs"] == [{"name": "text", "strength": 2}]
    assert (rows[-1]["path"], rows[-1]["status"]) == ("/v1/completions", 200)
    assert rows[-1]["new_tokens"] > 0
    assert "Kate" not in caplog.text


def test_metrics_and_health(served: Served) -> None:
    before = served.web.get("/metrics").text
    served.text(max_tokens=3)
    wait_for(lambda: served.engine.idle)
    after = served.web.get("/metrics").text
    count = re.compile(r'patchbay_requests_total\{path="/v1/completions",status="200"\} (\d+)')
    assert int(count.findall(after)[0]) == int((count.findall(before) or ["0"])[0]) + 1
    assert re.search(r"# TYPE patchbay_running_texts gauge\npatchbay_running_texts 0\n", after)
    assert httpx.get(served.web.base_url.join("/healthz"), trust_env=False).json() == {"status": "ok"}
    assert httpx.get(served.web.base_url.join("/metrics"), trust_env=False).status_code == 401


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    assert served.web.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert served.web.get("/v1/completions").status_code == 405
    assert served.web.post("/v1/completions", content=b"{").json()["error"]["code"] == "bad_json"
