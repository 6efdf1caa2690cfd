"""The command line: `patchbay find successor-heads gpt2 --task successor`. Commands are made from the functions' signatures.

Nothing that computes is imported before a command that needs it runs: help reads the methods' files as text. Answers go to
stdout (`--json`: one document), progress and errors to stderr. Exit codes: 0 done, 1 a check failed, 2 the request cannot be
met (one message, no traceback), 130 interrupted. Files are written whole or not at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from patchbay import __version__, options, reading
from patchbay.commands import Commands, Room, json_option, load_model, model_options
from patchbay.port import PatchbayError, suggest

F = TypeVar("F", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
EXAMPLES = """\b
Examples:
  patchbay demo --report demo.html
  patchbay show tiny L2.H1
  patchbay find direct-logit-attribution tiny --task facts_in_context --n 50 --out attribution
  patchbay prove ablation tiny --task facts_in_context --parts attribution:3
  patchbay turn scale tiny --parts L2.H1 --strength 4 -o context.knob
  patchbay generate tiny "The capital of Zorland is" --knob context.knob@2
"""


class Refused(click.ClickException):
    """A request that cannot be met: one message on stderr, exit code 2."""

    exit_code = 2


class Root(Commands):
    """`patchbay` itself: its own commands and one lazy group for each folder of methods."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PatchbayError as error:
            raise Refused(str(error)) from error
        except BrokenPipeError:  # the reader of our output left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:
            raise Refused(f"{error.filename or 'a file'}: {error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was left half-written", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *options.rooms()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in options.rooms():
            return Room(cmd_name, help=options.ROOMS[cmd_name] + " METHOD --help tells what each one measures.")
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(own + [(f"{room} METHOD", options.ROOMS[room]) for room in options.rooms()])


@click.group(cls=Root, context_settings=SETTINGS, epilog=EXAMPLES)
@click.version_option(__version__, "--version", message="patchbay %(version)s")
def cli() -> None:
    """Find the parts of a language model that do a thing, prove it, and turn them like knobs.

    MODEL is a local Hugging Face folder, a hub name, or a built-in model (tiny, tiny-llama, tiny-moe).
    """


def main() -> None:
    """The console script."""
    cli(prog_name="patchbay")


def command(name: str, *parameters: click.Parameter) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of `patchbay`, with `--json`."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.Command(name, params=[*parameters, json_option()], callback=function, help=function.__doc__)
        cli.add_command(made)
        return made

    return decorate


# --- the commands that are no methods -----------------------------------------------------------------


@command(
    "demo",
    click.Option(["--model"], default="tiny", show_default=True, metavar="MODEL", help="Any model that `show` takes."),
    click.Option(
        ["--report"],
        default="patchbay-demo.html",
        show_default=True,
        metavar="FILE",
        help="Page to write; a knob goes beside it.",
    ),
    click.Option(["--n"], type=click.IntRange(8), help="Number of prompts; without it, fewer for larger models."),
    click.Option(["--seed"], type=int, default=0, show_default=True, help="Of prompts, splits and random controls."),
    *model_options(),
)
def demo(model: str, report: str, n: int | None, seed: int, as_json: bool, **given: Any) -> None:
    """The whole story in a minute: find the heads, prove it, turn one, see what else changes."""
    from patchbay import demo as story
    from patchbay import screen

    told = story.tell(load_model(model, given, quiet=as_json), seed=seed, report=report, quiet=as_json, n=n)
    if as_json:
        screen.emit(told)


@command("show", click.Argument(["model"]), click.Argument(["part"], required=False), *model_options())
def show(model: str, part: str | None, as_json: bool, **given: Any) -> None:
    """What a model is: its shape, its self-check and its parts; or one PART (L3.H5) or port (L3.H5.z) of it."""
    from patchbay import screen

    loaded = load_model(model, given, quiet=as_json)
    card = screen.model_card(loaded) if part is None else screen.part_card(loaded, part)
    if as_json:
        screen.emit(card)
    elif part is None:
        screen.say(*screen.model_lines(card))
    else:
        screen.say(*screen.part_lines(card))


@command("families", click.Argument(["names"], nargs=-1, metavar="[FAMILY]..."))
def families(names: tuple[str, ...], as_json: bool) -> None:
    """Model families and the ports that each offers, checked now on small random models; exit code 1 if one fails."""
    from patchbay import screen

    with screen.working("loading", quiet=as_json):
        from patchbay.check import family_table
        from patchbay.tiny.twins import FAMILY_CONFIGS
    unknown = next((name for name in names if name not in FAMILY_CONFIGS), None)
    if unknown is not None:
        known = list(FAMILY_CONFIGS)
        raise PatchbayError(f"no family {unknown!r} to check; families are {', '.join(known)}{suggest(unknown, known)}")
    rows: list[dict[str, Any]] = []
    asked = list(names) or list(FAMILY_CONFIGS)
    with screen.progress("checking families", quiet=as_json) as bar:
        for i, name in enumerate(asked):
            rows += family_table([name])
            bar(i + 1, len(asked))
    if as_json:
        screen.emit(rows)
    else:
        screen.say(screen.families_table(rows))
    failed = [str(row["family"]) for row in rows if not row["verified"]]
    if failed:
        click.echo(f"{len(failed)} of {len(rows)} families were not verified: {', '.join(failed)}", err=True)
        raise SystemExit(1)


@command(
    "tasks",
    click.Argument(["name"], required=False),
    click.Argument(["model"], required=False),
    click.Option(["--n"], type=int, default=3, show_default=True, help="Prompts to show."),
    *model_options(),
)
def tasks(name: str | None, model: str | None, n: int, as_json: bool, **given: Any) -> None:
    """The tasks and their options; with NAME[:KEY=VALUE,...] and MODEL, the first prompts of one."""
    from patchbay import screen

    if name is None:
        rows = [one._asdict() for one in options.tasks().values()]
        if as_json:
            screen.emit(rows)
        else:
            screen.say(screen.table("tasks", ("task", "what it asks", "options"), [list(row.values()) for row in rows]))
        return
    if model is None:
        raise PatchbayError(f"the prompts of {name!r} are made for a model: patchbay tasks {name} MODEL")
    loaded = load_model(model, given, quiet=as_json)
    task = reading.read_task(name, loaded, n=None if "n=" in name else n)
    if as_json:
        screen.emit(task.to_json())
    else:
        click.echo(task.show(loaded.tokenizer, n))


@command(
    "generate",
    click.Argument(["model"]),
    click.Argument(["prompts"], nargs=-1, required=True, metavar="PROMPT..."),
    click.Option(
        ["--knob", "knobs"], multiple=True, metavar="FILE[@S]", help="Turn a knob, to strength S; may be repeated."
    ),
    click.Option(
        ["--edit", "edits"],
        multiple=True,
        metavar="EDIT",
        help='Make an edit, as "scale(L3.H5.z, 0)"; may be repeated.',
    ),
    click.Option(["--max-new-tokens"], type=click.IntRange(1), default=20, show_default=True),
    click.Option(
        ["--temperature"], type=click.FloatRange(0, min_open=True), help="Sample instead of taking the likeliest token."
    ),
    click.Option(["--seed"], type=int, default=0, show_default=True, help="Of sampling."),
    *model_options(),
)
def generate(
    model: str, prompts: tuple[str, ...], knobs: tuple[str, ...], edits: tuple[str, ...], max_new_tokens: int,
    temperature: float | None, seed: int, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Continue each PROMPT; with knobs or edits, before and after side by side."""
    import torch

    from patchbay import screen
    from patchbay.model import flat_edits

    loaded = load_model(model, given, quiet=as_json)
    changes = [*map(reading.read_knob, knobs), *(reading.read_edit(text, loaded) for text in edits)]
    for knob in (change for change in changes if hasattr(change, "fits")):
        if not knob.fits(loaded) and knob.made_on:
            click.echo(f"note: {knob.name!r} was made on other weights ({knob.made_on.get('source')})", err=True)
    made = flat_edits(changes)
    for edit in made:
        loaded.require(edit.port)
    sampling = {"do_sample": True, "temperature": temperature} if temperature is not None else {}
    rows = [{"prompt": prompt} for prompt in prompts]
    for name, active in [("before", []), ("after", made)][: 2 if changes else 1]:
        for row in rows:
            torch.manual_seed(seed)
            row[name] = loaded.generate(row["prompt"], max_new_tokens, edits=active, **sampling)
    if as_json:
        screen.emit({"model": loaded.source, "edits": [str(edit) for edit in made], "generations": rows})
    else:
        screen.say(*screen.side_by_side(rows, [str(edit) for edit in made], changed=bool(changes)))


@command(
    "replay",
    click.Argument(["folder"]),
    click.Argument(["model"], required=False),
    click.Option(
        ["--rtol"], type=float, default=1e-5, show_default=True, help="Allowed difference over the largest value."
    ),
    *model_options(),
)
def replay(folder: str, model: str | None, rtol: float, as_json: bool, **given: Any) -> None:
    """Run a saved Result's method again, as recorded, and say whether it agrees; exit code 1 if not."""
    import patchbay as pb
    from patchbay import screen

    saved = pb.load_result(folder)
    source = model or (saved.provenance.get("model") or {}).get("source")
    loaded = load_model(source, given, quiet=as_json) if source else None
    with screen.working("running it again", quiet=as_json):
        outcome = pb.replay(saved, loaded, rtol=rtol)
    if as_json:
        screen.emit(
            {
                "agrees": outcome.agrees,
                "largest": outcome.largest,
                "same_model": outcome.same_model,
                "notes": outcome.notes,
            }
        )
    else:
        click.echo(str(outcome))
    if not outcome.agrees:
        raise SystemExit(1)
