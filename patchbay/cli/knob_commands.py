"""The commands that use knobs: `patchbay generate`, `patchbay knob show`, `patchbay knob when` and `patchbay knob export`.

`generate` shows before and after side by side, token by token where somebody looks at a terminal. With `--each`, knob i is for
prompt i alone, and all prompts run as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from patchbay.cli import complete, outputs, prompt_files, reading
from patchbay.cli.commands import Commands, json_option, load_model, model_options
from patchbay.cli.under import OTHER, fitting, under_options
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay import Knob, Model

# --- generate -----------------------------------------------------------------------------------------


def _generate(
    model: str, prompts: tuple[str, ...], knobs: tuple[str, ...], edits: tuple[str, ...], each: bool, max_new_tokens: int,
    temperature: float | None, seed: int, other_weights: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Continue each PROMPT; with knobs or edits, before and after side by side.

    Knobs and edits act together, in the order given, knobs first; with --each the first knob is for the first prompt, the second
    for the second, and one prompt, or one knob, stands for as many as there are of the other.
    """
    from patchbay.draw import screen

    loaded = load_model(model, given, quiet=as_json)
    turned = [fitting(reading.read_knob(text), loaded, other_weights) for text in knobs]
    written = [reading.read_edit(text, loaded) for text in edits]
    if each and not turned:
        raise PatchbayError("--each is one knob for each prompt, and no --knob was given")
    texts, own = _paired(prompts, turned) if each else (list(prompts), [turned] * len(prompts))
    changes: list[list[Any]] = [[*entry, *written] for entry in own]
    shown = [[str(edit) for item in entry for edit in _made(item)] for entry in changes]
    changed = bool(turned or written)
    rows = [{"prompt": text} for text in texts]
    sampling = {"do_sample": True, "temperature": temperature} if temperature is not None else {}
    passes: dict[str, list[Any]] = {"before": [None] * len(rows)} | ({"after": list(changes)} if changed else {})
    edits_shown = [_in_force(knob) for knob in turned] + [str(edit) for edit in written]
    with screen.growing(rows, edits_shown, changed=changed, quiet=as_json) as note:
        for name, entries in passes.items():
            _fill(loaded, rows, name, entries, max_new_tokens, seed, sampling, note)
    if as_json:
        knobs_shown = [{"name": knob.name, "strength": knob.strength, "neutral": knob.neutral} for knob in turned]
        held = {"edits": shown if each else shown[0], "knobs": knobs_shown}
        screen.emit({"model": loaded.source, **held, "generations": rows})
    else:
        screen.say(*screen.side_by_side(rows, edits_shown, changed=changed))


def _fill(
    model: Model, rows: list[dict[str, str]], name: str, entries: Sequence[Any], n: int, seed: int, sampling: dict[str, Any],
    note: Callable[[int, str, str], None] | None,
) -> None:  # fmt: skip
    """Put the generations of one pass into the rows: as one batch, or one by one where tokens are drawn by a seed."""
    import torch

    from patchbay.knobs.rows import generate_rows

    ids: dict[int, list[int]] = {}

    def heard(row: int, token: int) -> None:
        ids.setdefault(row, []).append(token)
        if note is not None:
            note(row, name, rows[row]["prompt"] + model.decode(ids[row]))

    groups = [[i] for i in range(len(rows))] if sampling else [list(range(len(rows)))]
    for group in groups:
        torch.manual_seed(seed)
        listen: dict[str, Any] = (
            {} if note is None else {"note": lambda row, token, group=group: heard(group[row], token)}
        )
        prompts = [rows[i]["prompt"] for i in group]
        grown = generate_rows(model, prompts, [entries[i] for i in group], n, **listen, **sampling)
        for i, text in zip(group, grown, strict=True):
            rows[i][name] = text


def _paired(prompts: Sequence[str], knobs: Sequence[Knob]) -> tuple[list[str], list[list[Knob]]]:
    """As many prompts as knobs; one stands for many."""
    n = max(len(prompts), len(knobs))
    if len(prompts) not in (1, n) or len(knobs) not in (1, n):
        raise PatchbayError(
            f"--each: {len(prompts)} prompts and {len(knobs)} knobs; give as many of both, or one of either"
        )
    return list(prompts) * (n // len(prompts)), [[knob] for knob in list(knobs) * (n // len(knobs))]


def _made(item: Any) -> list[Any]:
    """The edits of a knob at its strength, or the edit itself."""
    return item.edits_at() if hasattr(item, "edits_at") else [item]


def _in_force(knob: Knob) -> str:
    """`context at strength 4: add(L2.resid_out, tensor[64])`; at its neutral strength it makes no edits."""
    made = ", ".join(map(str, _made(knob))) or "no edits, it is neutral there"
    return f"{knob.name} at strength {knob.strength:g}: {made}"


generate = click.Command(
    "generate",
    params=[
        click.Argument(["model"], shell_complete=complete.models),
        click.Argument(["prompts"], nargs=-1, required=True, metavar="PROMPT..."),
        *under_options(),
        click.Option(["--max-new-tokens"], type=click.IntRange(1), default=20, show_default=True, help="Tokens to add, or fewer where the text ends."),
        click.Option(["--temperature"], type=click.FloatRange(0, min_open=True), help="Sample instead of taking the likeliest token."),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of sampling."),
        *model_options(),
        json_option(),
    ],
    callback=_generate,
    help=_generate.__doc__,
)  # fmt: skip


# --- knob files ---------------------------------------------------------------------------------------


def _show(file: str, rows: int, as_json: bool) -> None:
    """What a knob file holds: edits, strength, the weights it was made on, and its evidence."""
    from patchbay.draw import result_lines, screen

    knob = reading.read_knob(file)
    card = knob_card(knob)
    if as_json:
        evidence = {name: screen.result_json(result, rows) for name, result in knob.evidence.items()}
        screen.emit(card | {"evidence": evidence})
        return
    from rich.markup import escape

    made, lines = (
        card["made_on"],
        [f"[bold]{escape(card['name'])}[/] at strength {card['strength']:g}, neutral at {card['neutral']:g}"],
    )
    lines += [f"  {escape(edit)}" for edit in card["edits"][:rows]]
    lines += [f"  and {len(card['edits']) - rows} more edits"] if len(card["edits"]) > rows else []
    lines.append(f"at this strength: {escape(', '.join(card['now'][:rows])) or 'no edits'}")
    source = (
        f"{made.get('source') or 'a model without a name'} (weights {made.get('fingerprint')})" if made else "no model"
    )
    lines.append(f"made by {escape(str(card['method']))} on {escape(source)}")
    screen.say(*lines)
    for name, result in knob.evidence.items():
        screen.say(f"\n[bold]{escape(name)}[/]", *result_lines.of_result(result, rows))


def knob_card(knob: Knob) -> dict[str, Any]:
    """A knob as plain data, without its evidence."""
    return {
        "name": knob.name,
        "strength": knob.strength,
        "neutral": knob.neutral,
        "edits": [str(edit) for edit in knob.edits],
        "now": [str(edit) for edit in knob.edits_at()],
        "method": knob.provenance.get("method"),
        "options": knob.provenance.get("options"),
        "made_on": dict(knob.made_on),
        "date": knob.provenance.get("date"),
    }


def _export(
    file: str, model: str, out: str, form: str, other_weights: bool, overwrite: bool, as_json: bool, **given: Any
) -> None:
    """Write what a knob does into FOLDER for other programs: checkpoint, lora (PEFT), gguf (control vector), vector (safetensors)."""
    from patchbay.draw import screen

    loaded = load_model(model, given, quiet=as_json)
    knob = fitting(reading.read_knob(file), loaded, other_weights)
    with screen.working(f"exporting {knob.name}", quiet=as_json):
        written = knob.export(loaded, out, form=form, overwrite=overwrite)
    if as_json:
        screen.emit(
            {"folder": str(written.folder), **{k: getattr(written, k) for k in ("form", "files", "error", "changed")}}
        )
    else:
        click.echo(str(written))


def _when(
    file: str, model: str, out: str, role: str | None, detector: str | None, neutral: str | None, rate: float, port: str | None, below: bool,
    other_weights: bool, overwrite: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Write a knob that acts only in a chat's messages of a role, or only where a detector, another knob's direction, fires.

    The detector fires at a share --rate of the positions of the neutral texts; it is read in the same run, token by token.
    """
    import patchbay as pb
    from patchbay.draw import screen

    if role is None and detector is None:
        raise PatchbayError("say when the knob acts: --role ROLE, or --detector KNOB with --neutral FILE")
    if (detector is None) != (neutral is None):
        raise PatchbayError(
            "--detector and --neutral go together: its threshold is where it rarely fires on neutral texts"
        )
    loaded = load_model(model, given, quiet=as_json)
    made = fitting(reading.read_knob(file), loaded, other_weights)
    if detector is not None and neutral is not None:
        found = fitting(reading.read_knob(detector), loaded, other_weights)
        texts = prompt_files.read_texts(neutral, "--neutral")
        made = made.when(pb.probe(loaded, found, texts, port=port, rate=rate, below=below))
    made = made.when(role) if role is not None else made
    made.save(out, overwrite=overwrite)
    if as_json:
        screen.emit(knob_card(made) | {"saved": str(out)})
    else:
        screen.say(
            *(outputs.escaped(line) for line in repr(made).splitlines()), f"[dim]saved[/] {outputs.escaped(out)}"
        )


class Files(Commands):
    """`patchbay knob`: a group that says what it has."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: Mapping[str, click.Command] = self.commands
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(100)) for name, command in own.items()])


knob = Files("knob", help="Knob files: show what one holds, say when it acts, export what it does.")
_FILE = click.Argument(["file"], metavar="FILE[@S]")
knob.add_command(
    click.Command(
        "show",
        params=[_FILE, click.Option(["--rows"], type=click.IntRange(1), default=10, show_default=True, help="Rows of each table."), json_option()],
        callback=_show,
        help=_show.__doc__,
    )
)  # fmt: skip
knob.add_command(
    click.Command(
        "when",
        params=[
            _FILE,
            click.Argument(["model"], shell_complete=complete.models),
            click.Option(["-o", "--out"], required=True, metavar="FILE", help="File to write."),
            click.Option(["--role"], type=click.Choice(["system", "user", "assistant", "tool"]), help="Only in a chat's messages of this role."),
            click.Option(["--detector"], metavar="KNOB", help="Only where this knob's direction, read where it adds, is above a threshold."),
            click.Option(["--neutral"], metavar="FILE", help="Texts on which the detector should rarely fire, which set its threshold."),
            click.Option(["--rate"], type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.01, show_default=True,
                         help="Share of the positions of the neutral texts at which it fires."),
            click.Option(["--port"], metavar="PORT", help="Where the detector reads instead, as L2.resid_out."),
            click.Option(["--below"], is_flag=True, help="Below the threshold, not above."),
            click.Option(["--overwrite"], is_flag=True, help="Replace a knob that is there."),
            OTHER,
            *model_options(),
            json_option(),
        ],
        callback=_when,
        help=_when.__doc__,
    )
)  # fmt: skip
knob.add_command(
    click.Command(
        "export",
        params=[
            _FILE,
            click.Argument(["model"], shell_complete=complete.models),
            click.Option(["-o", "--out"], required=True, metavar="FOLDER", help="Folder to write."),
            click.Option(["--form"], type=click.Choice(["checkpoint", "lora", "gguf", "vector"]), default="checkpoint", show_default=True,
                         help="Whole weights; a LoRA adapter; or control vectors as GGUF or safetensors, for other programs."),
            click.Option(["--overwrite"], is_flag=True, help="Replace what an export wrote there before."),
            OTHER,
            *model_options(),
            json_option(),
        ],
        callback=_export,
        help=_export.__doc__,
    )
)  # fmt: skip
