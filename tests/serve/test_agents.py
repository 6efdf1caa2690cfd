"""The agents' tools, asked by the official client: what each answers is what the library says, and nothing leaves the folder."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import jsonschema
import pytest
import torch
from mcp import StdioServerParameters
from mcp.client.client import Client
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.results.given import kinds_of
from patchbay.serve.agents import http_app, tools_of
from patchbay.serve.guard import Keys
from patchbay.serve.instrument import Instrument, told
from patchbay.serve.schema import parameters
from tests.tolerance import close

PROMPT = "The capital of Lolavia is"
TOOLS = {
    "describe_model",
    "list_methods",
    "method_help",
    "run_method",
    "tap",
    "edit_and_generate",
    "save_knob",
    "search_papers",
}
TOOLS |= {"check_claim", "read_result"}


@pytest.fixture(scope="module")
def instrument(tmp_path_factory: pytest.TempPathFactory) -> Instrument:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "outside.txt").write_text("secret")
    return Instrument(pb.load("tiny"), folder / "kept")


def asked(instrument: Instrument, do: Callable[[Client], Awaitable[Any]]) -> Any:
    async def within() -> Any:
        async with Client(tools_of(instrument)) as client:
            return await do(client)

    return anyio.run(within)


def call(instrument: Instrument, tool: str, **inputs: Any) -> dict[str, Any]:
    answer = asked(instrument, lambda client: client.call_tool(tool, inputs))
    assert not answer.is_error, answer.content[0].text
    assert answer.content[0].text
    return answer.structured_content


def refused(instrument: Instrument, tool: str, **inputs: Any) -> str:
    answer = asked(instrument, lambda client: client.call_tool(tool, inputs))
    assert answer.is_error
    return str(answer.content[0].text)


def test_the_tools_are_listed_with_their_inputs(instrument: Instrument) -> None:
    listed = asked(instrument, lambda client: client.list_tools()).tools
    assert {tool.name for tool in listed} == TOOLS
    assert all(tool.description and tool.input_schema["type"] == "object" for tool in listed)
    assert "ctx" not in json.dumps([tool.input_schema for tool in listed])


def test_methods_their_help_and_their_inputs_as_schema(instrument: Instrument) -> None:
    rows = call(instrument, "list_methods")["methods"]
    assert {row["name"].partition(".")[0] for row in rows} == {"find", "prove", "turn", "decode", "measure"}
    for row in rows[::9]:
        inputs = instrument.method_help(row["name"])[1]["inputs"]
        jsonschema.Draft202012Validator.check_schema(inputs)
        json.dumps(inputs)
    inputs = call(instrument, "method_help", method="find.logit_lens")["inputs"]
    assert inputs["properties"]["batch_size"] == {
        "type": "integer",
        "default": 8,
        "description": inputs["properties"]["batch_size"]["description"],
    }
    assert (
        "positions" in inputs["properties"]["positions"]["description"]
        or inputs["properties"]["positions"]["description"]
    )
    assert inputs["required"] == ["task"]
    assert "did you mean 'find.logit_lens'" in refused(instrument, "method_help", method="find.logit_len")
    assert "no method" in refused(instrument, "method_help", method="train.tune_parts")


def test_a_method_runs_is_kept_and_is_read_again(instrument: Instrument) -> None:
    task = {"name": "facts_in_context", "n": 8}
    ran = call(instrument, "run_method", method="find.direct_logit_attribution", inputs={"task": task}, save_as="heads")
    model = instrument.model
    expected = pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=8))
    assert ran["unit"] == expected.unit
    assert [row["part"] for row in ran["rows"][:3]] == [str(part) for part in expected.top(3)]
    assert pb.load_result(instrument.folder / "heads").agrees(expected)
    again = call(instrument, "read_result", name="heads", rows=3)
    assert again["rows"] == ran["rows"][:3]
    body = asked(instrument, lambda client: client.read_resource("result://heads"))
    assert json.loads(body.contents[0].text)["rows"][:3] == again["rows"]
    assert "already" in refused(
        instrument, "run_method", method="find.direct_logit_attribution", inputs={"task": task}, save_as="heads"
    )
    proof = call(
        instrument,
        "run_method",
        method="prove.ablation",
        inputs={"task": task, "parts": ["L1.H3"], "draws": 3},
        save_as="proof",
    )
    assert 0 < proof["numbers"]["p"] <= 1
    assert proof["units"]["p"] == "probability"


def test_results_that_rank_no_parts_are_told_as_they_are_printed() -> None:
    """A meter's one number, and numbers over layers and positions."""
    assert told(pb.Result(torch.tensor(2.5), (), "nats", name="loss"))[1]["numbers"] == {"loss": 2.5}
    cells = pb.Result(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), ("layer", "position"), "nats", name="loss")
    assert told(cells)[1]["rows"] == [{"variable": "loss", "lowest": "1.000", "mean": "3.000", "highest": "6.000"}]


def test_a_knob_is_made_kept_and_turned(instrument: Instrument) -> None:
    made = call(
        instrument, "run_method", method="turn.scale", inputs={"parts": "L1.H1", "strength": 0.0}, save_as="text"
    )
    assert made["kind"] == "knob"
    longer = f"{PROMPT} Grerum. Emma asked Kate about the violin. {PROMPT}"
    said = call(instrument, "edit_and_generate", prompt=longer, knobs=[{"name": "text"}], max_new_tokens=2)
    assert (said["before"], said["after"]) == (" Budurg.", " Grerum.")
    by_hand = {"op": "scale", "port": "L1.H1.z", "value": 0}
    assert (
        call(instrument, "edit_and_generate", prompt=longer, edits=[by_hand], max_new_tokens=2)["after"] == " Grerum."
    )
    call(instrument, "save_knob", name="mine", edits=[by_hand], strength=1.0)
    assert pb.load_knob(instrument.folder / "mine.knob", instrument.model).edits[0].op == "scale"
    logits = [
        pb.run(instrument.model, longer, edits=e).last_logits[0].log_softmax(-1)
        for e in ([], [pb.scale("L1.H1.z", 0.0)])
    ]  # type: ignore[arg-type]
    assert close(said["kl"], float((logits[0].exp() * (logits[0] - logits[1])).sum()), of=logits[0])


def test_a_tap_is_what_run_sees(instrument: Instrument) -> None:
    seen = call(instrument, "tap", prompt=PROMPT, port="L1.H2.z", positions=[-1, 0])
    model = instrument.model
    value = pb.run(model, PROMPT, taps=[model.port("L1.H2.z")])[model.port("L1.H2.z")][0]
    assert close(torch.tensor(seen["values"]), value[[-1, 0]])
    assert seen["tokens"] == [model.decode([token]) for token in model.encode(PROMPT)[0]]
    assert "note" in call(instrument, "tap", prompt=PROMPT, port="logits") or seen
    assert "the prompt has" in refused(instrument, "tap", prompt=PROMPT, port="L1.resid_out", positions=[99])


def test_papers_are_searched(instrument: Instrument, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHBAY_PAPERS", str(tmp_path / "none.sqlite"))
    found = call(instrument, "search_papers", words="induction heads")["papers"]
    assert "olsson2022" in [row["key"] for row in found]
    assert "no paper" in refused(instrument, "check_claim", key="nobody1900")


@pytest.mark.parametrize(
    ("tool", "inputs"),
    [
        ("read_result", {"name": "../outside"}),
        ("read_result", {"name": "/etc"}),
        ("read_result", {"name": ".."}),
        ("save_knob", {"name": "../k", "edits": [{"op": "zero", "port": "L1.H1.z"}]}),
        ("run_method", {"method": "measure.text_loss", "inputs": {"items": "../outside.txt"}}),
        ("run_method", {"method": "measure.minimal_pairs", "inputs": {"items": "/etc/passwd"}}),
        (
            "run_method",
            {"method": "find.logit_lens", "inputs": {"task": {"name": "facts_in_context"}}, "save_as": "../x"},
        ),
        ("run_method", {"method": "find.logit_lens", "inputs": {"task": {"name": "from_file", "path": "/etc/passwd"}}}),
        ("edit_and_generate", {"prompt": PROMPT, "knobs": [{"name": "../../k"}]}),
        ("edit_and_generate", {"prompt": PROMPT, "max_new_tokens": 10_000}),
        ("edit_and_generate", {"prompt": PROMPT, "edits": [{"op": "__class__", "port": "L1.H1.z"}]}),
        ("edit_and_generate", {"prompt": PROMPT, "edits": [{"op": "add", "port": "L1.resid_out", "value": "os"}]}),
        ("run_method", {"method": "os.system", "inputs": {}}),
        ("run_method", {"method": "find.__doc__", "inputs": {}}),
        ("tap", {"prompt": "x " * 10_000, "port": "L1.resid_out"}),
    ],
)
def test_what_leads_out_of_the_folder_or_the_bounds_is_refused(
    instrument: Instrument, tool: str, inputs: dict[str, Any]
) -> None:
    before = sorted(path.name for path in instrument.folder.parent.rglob("*"))
    said = refused(instrument, tool, **inputs)
    assert "secret" not in said
    assert "root:" not in said
    assert "Traceback" not in said
    assert sorted(path.name for path in instrument.folder.parent.rglob("*")) == before


@pytest.fixture
def facts(instrument: Instrument, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table beside the folder, in the working and the home folder at once: only that it lies outside stands in the way of reading it."""
    path = instrument.folder.parent / "facts.csv"
    path.write_text("subject,answer,text\nLolavia,Grerum,a\nEmma,Kate,b\n")
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    return path


def test_a_file_outside_the_folder_is_refused_by_every_input(instrument: Instrument, facts: Path) -> None:
    for row in instrument.list_methods()[1]["methods"]:
        for name, parameter in parameters(instrument.method(row["name"])).items():
            for value in (str(facts), [str(facts)], {"a": [str(facts)]}):
                if isinstance(value, dict) and "Task" in kinds_of(parameter):
                    value = {"name": "facts_in_memory", "table": str(facts)}
                with pytest.raises(PatchbayError, match="outside the folder|is no name|is no path inside"):
                    instrument.giver.value(value, parameter)
                    pytest.fail(f"{row['name']} takes {name}={value}")


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        ("measure.text_loss", {"items": "FACTS:text=answer"}),
        ("measure.text_loss", {"items": "~/facts.csv"}),
        ("measure.text_loss", {"items": "~/facts.csv:text=answer"}),
        ("measure.text_loss", {"items": "facts.csv"}),
        ("measure.text_loss", {"items": "/" + "./" * 3000 + "FACTS"}),
        ("measure.text_loss", {"items": "facts_in_memory:table=FACTS"}),
        ("measure.side_effects", {"meters": ["text-loss=FACTS"]}),
        ("measure.side_effects", {"meters": {"text_loss": {"items": "FACTS:text=answer"}}}),
        ("decode.compare", {"decoders": ["speculative(kept='~/facts.csv')"]}),
        ("find.logit_lens", {"task": {"name": "facts_in_memory", "table": "FACTS"}}),
    ],
)
def test_however_a_file_outside_is_written_it_is_refused(
    instrument: Instrument, facts: Path, method: str, inputs: dict[str, Any]
) -> None:
    given = json.loads(json.dumps(inputs).replace("FACTS", str(facts)))
    with pytest.raises(PatchbayError, match="outside the folder|here a task|here meters"):
        instrument.run_method(method, given)


def test_a_file_in_the_folder_is_the_one_that_is_read(instrument: Instrument, facts: Path) -> None:
    """Under a name that the working folder has too; with its fields named, and in a text of a decoder."""
    own = instrument.folder / "facts.csv"
    own.write_text("id,text\n1,Emma asked Kate about the violin.\n")
    assert instrument.giver.checked("facts.csv") == str(own.resolve())
    assert instrument.giver.checked("facts.csv:text=text") == f"{own.resolve()}:text=text"
    assert instrument.giver.checked("speculative(kept='facts.csv', n=2)") == f"speculative(kept='{own.resolve()}', n=2)"
    read = instrument.run_method("measure.text_loss", {"items": "facts.csv:text=text"})[1]
    assert read["numbers"]["value"] > 0  # the other file has words that this model does not know
    own.unlink()
    for text in ("The capital: a=b", "a((1, 2))", "", " ", "a\0b", "\ud800", "x" * 9000, "Say: 'text_loss'"):
        assert instrument.giver.checked(text) == text


def test_links_out_of_the_folder_are_not_followed(instrument: Instrument) -> None:
    link = instrument.folder / "link.txt"
    link.symlink_to(instrument.folder.parent / "outside.txt")
    said = refused(instrument, "run_method", method="measure.text_loss", inputs={"items": "link.txt"})
    link.unlink()
    assert "secret" not in said


PAGE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")
STEP = re.compile(r"```json\n([^`]*)```|^Checked: `([^\n]*)`$", re.MULTILINE)


def test_the_worked_example_is_true_step_by_step(tmp_path: Path) -> None:
    """Every call of docs/agents.md is made, in order, and every sentence that it marks as checked is checked."""
    instrument, answers, checked = Instrument(pb.load("tiny"), tmp_path), [], 0
    for block, check in STEP.findall(PAGE):
        if block:
            asked_for = json.loads(block)
            answers.append(call(instrument, asked_for["tool"], **asked_for["inputs"]))
        else:
            assert eval(check, {"a": answers[-1], "before": answers}), check
            checked += 1
    assert len(answers) >= 8
    assert checked >= len(answers)


def test_a_call_that_is_cancelled_ends(instrument: Instrument, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep stops at its next batch, nothing is kept, and the next call is answered; progress was told."""
    told: list[float] = []

    async def do(client: Client) -> None:
        async def hear(done: float, total: float | None, message: str | None) -> None:
            told.append(done)
            scope.cancel()

        inputs = {"task": {"name": "facts_in_context", "n": 60}, "batch_size": 1}
        with anyio.CancelScope() as scope:
            await client.call_tool(
                "run_method",
                {"method": "prove.activation_patching", "inputs": inputs, "save_as": "cut"},
                progress_callback=hear,
            )
        assert scope.cancelled_caught

    monkeypatch.setattr("patchbay.sweeps.settings.AFTER", 0.0)
    asked(instrument, do)
    assert told
    with instrument.lock:  # free again
        pass
    assert not (instrument.folder / "cut").exists()
    assert call(instrument, "describe_model")


def test_an_error_of_a_tools_own_is_an_id(
    instrument: Instrument, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(instrument.giver, "result", lambda name: 1 / 0)
    said = refused(instrument, "read_result", name="x")
    assert "in its log under" in said
    assert "division" not in said
    assert said.split()[-1] in caplog.text


@pytest.mark.slow
def test_the_command_serves_the_official_client_over_stdio(tmp_path: Path) -> None:
    """A process of its own: what a method prints does not disturb the protocol."""
    settings = StdioServerParameters(
        command=sys.executable,
        args=["-m", "patchbay", "mcp", "tiny", "--folder", str(tmp_path / "k")],
        env=dict(os.environ),
    )

    async def do() -> Any:
        async with Client(stdio_client(settings)) as client:
            tools = {tool.name for tool in (await client.list_tools()).tools}
            said = await client.call_tool("edit_and_generate", {"prompt": PROMPT, "max_new_tokens": 2})
            return tools, said.structured_content

    tools, said = anyio.run(do)
    assert tools == TOOLS
    assert said["before"] == " Budurg."


def test_over_http_the_tools_stand_behind_the_door(instrument: Instrument, listening: Callable[..., int]) -> None:
    """Without the token, from another origin or by another name nothing is heard; with it the official client is served."""
    keys = Keys()
    url = f"http://127.0.0.1:{listening(http_app(instrument, keys))}/mcp"
    bearer = {"authorization": f"Bearer {keys.token}"}
    hello = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for headers, status in (
        ({}, 401),
        (bearer | {"origin": "http://evil.example"}, 403),
        (bearer | {"host": "evil.example"}, 421),
    ):
        assert httpx.post(url, json=hello, headers=headers, trust_env=False).status_code == status

    async def do() -> Any:
        async with (
            create_mcp_http_client(headers=bearer) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            return await client.call_tool("edit_and_generate", {"prompt": PROMPT, "max_new_tokens": 2})

    assert anyio.run(do).structured_content["before"] == " Budurg."
