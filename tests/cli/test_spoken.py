"""Refusals at the command line name options as they are written there, whatever the command, for every option there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from patchbay.cli import cli, options
from patchbay.cli.commands import method_command
from patchbay.cli.spoken import spoken

COMMANDS: dict[str, click.Command] = {
    f"{room} {name}": method_command(room, name) for room in options.rooms() for name in options.files(room)
}
COMMANDS |= {name: command for name, command in cli.commands.items() if not isinstance(command, click.Group)}
COMMANDS |= {f"knob {name}": command for name, command in cli.commands["knob"].commands.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command(name: str) -> None:
    """A value, a list, a text, nothing at all, and for a flag yes and no."""
    command = COMMANDS[name]
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert option.name is not None
        flags = [*option.opts, *option.secondary_opts]
        for value in ("3", "-1.5", "'last'", "[]", "['a', 'b']", "[...]", "", "True", "False"):
            said = spoken(f"give {option.name}={value}, or another", command.params)
            assert f"{option.name}=" not in said, said
            assert any(re.search(rf"{flag}\b", said) for flag in flags), said
            assert "'" not in said.replace("''", ""), said


def test_values_are_written_as_a_command_takes_them() -> None:
    params = COMMANDS["prove path_patching"].params
    for python, command in (
        ("batch_size=0 (1 or more)", "--batch-size 0 (1 or more)"),
        ("MLPs can be named: senders=['L0.mlp', 'L1.mlp'].", "MLPs can be named: --senders L0.mlp,L1.mlp."),
        ("batch_size=-2. More", "--batch-size -2. More"),
        ("make the task with corrupted=, or", "make the task with the column corrupted (of --prompts FILE), or"),
        ("takes another: task.with_metric(...)", "takes another: --metric NAME"),
        ("asked for n=0", "asked for --n 0"),
        ("'batch_size=20' is not a part", "'batch_size=20' is not a part"),  # as it was typed
        ("FILE:prompt=question,n=b+c", "FILE:prompt=question,n=b+c"),  # as it is written
        ("task x: has no option 'y'; its options are n=100, seed=0", "task x: has no option 'y'; its options are n=100, seed=0"),
        ("pb.load(model, family=patchbay.Family(...))", "pb.load(model, family=patchbay.Family(...))"),
    ):  # fmt: skip
        assert spoken(python, params) == command
    table = "train it anew: plan={'fresh': 1}; a file's columns={'prompt': 'text', ...}"
    said = """train it anew: --plan '{"fresh": 1}'; a file's columns={'prompt': 'text', ...}"""
    assert spoken(table, COMMANDS["train variant"].params) == said
    flags = COMMANDS["knob export"].params
    assert spoken("x is there; overwrite=True replaces it", flags) == "x is there; --overwrite replaces it"
    assert spoken("form='vector' holds other ports", flags) == "--form vector holds other ports"
    assert (
        spoken("positive=[...] and negative=[...]", COMMANDS["turn steer"].params)
        == "--positive FILE and --negative FILE"
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["turn", "steer", "tiny"], "both --positive FILE and --negative FILE"),
        (["prove", "activation-patching", "tiny", "--prompts", "FILE"], "the column corrupted (of --prompts FILE)"),
        (["find", "previous-token-heads", "tiny", "--task", "repeated_tokens", "--n", "0"], "--n 0"),
    ],
)
def test_commands_speak_it(args: list[str], said: str, tmp_path: Path) -> None:
    known = "The capital of Zusonia is Quivum. The capital of Zusonia is"
    (tmp_path / "own.csv").write_text(f"prompt,right,wrong\n{known}, Quivum, Bodik\n{known}, Bodik, Quivum\n")
    args = [str(tmp_path / "own.csv") if arg == "FILE" else arg for arg in args]
    done: Any = CliRunner().invoke(cli, args)
    assert done.exit_code == 2
    assert said in done.stderr, done.stderr
    assert not re.search(r"(?<![\w:,])[a-z_]+=(?!=)", done.stderr), done.stderr
