"""The command line: `patchbay find successor-heads gpt2 --task successor`. Commands are made from the functions' signatures.

Nothing that computes is imported before a command that needs it runs: help reads the methods' files as text. Answers go to
stdout (`--json`: one document), progress and errors to stderr. Exit codes: 0 done, 1 a check failed, 2 the request cannot be
met (one message, no traceback), 130 interrupted. Files are written whole or not at all.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from patchbay import __version__
from patchbay.cli import (
    check_method,
    compare_command,
    complete,
    corpus_command,
    feed_commands,
    harness_command,
    knob_commands,
    new,
    options,
    prompt_files,
    reading,
    serve_command,
    ui_command,
    why_command,
)
from patchbay.cli.commands import CALLED, Commands, json_option, load_model, model_options
from patchbay.cli.outputs import page_options, refuse_to_replace_page
from patchbay.cli.rooms import Room
from patchbay.cli.spoken import spoken
from patchbay.results import outside
from patchbay.signal.port import PatchbayError, suggest

F = TypeVar("F", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
EXAMPLES = """\b
Examples:
  patchbay demo --report demo.html
  patchbay run talking-heads --model tiny --report talking-heads.html
  patchbay why tiny "The capital of Lolavia is" --report why.html
  patchbay show tiny L2.H1
  patchbay find direct-logit-attribution tiny --task facts_in_context --n 50 --out attribution
  patchbay prove ablation tiny --task facts_in_context --parts attribution:3
  patchbay turn scale tiny --parts L2.H1 --strength 4 -o context.knob
  patchbay generate tiny "The capital of Lolavia is" --knob context.knob@2
  patchbay knob show context.knob
  patchbay knob export context.knob tiny -o edited
"""


class Refused(click.ClickException):
    """A request that cannot be met: one message on stderr, exit code 2."""

    exit_code = 2


class Root(Commands):
    """`patchbay` itself: its own commands and one lazy group for each folder of methods."""

    pressed = False  # Ctrl-C: libraries that it meets while they are imported make other errors of it

    @classmethod
    def press(cls, number: int, frame: Any) -> None:
        cls.pressed = True
        raise KeyboardInterrupt

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if self.pressed or isinstance(error, KeyboardInterrupt):
                click.echo("interrupted; nothing was left half-written", err=True)
                # an interrupt that left evaluated text is remembered until more is evaluated, and `python -m` dies of it
                eval("0")
                ctx.exit(130)
            if isinstance(error, PatchbayError):
                called = ctx.meta.get(CALLED)
                raise Refused(spoken(str(error), called.params if called is not None else [])) from error
            if isinstance(error, OSError):
                raise Refused(f"{error.filename or 'the output'}: {error.strerror or error}") from error
            raise

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

    MODEL is a local Hugging Face folder, a hub name, or a built-in model (tiny, tiny-wide, tiny-llama, tiny-moe).
    """


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, Root.press)
    for stream in (sys.stdout, sys.stderr):  # what an encoding lacks is shown as "?", not a reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _warn
    foreign = next((text for text in sys.argv if not text.isprintable() and _foreign(text)), None)
    if foreign is not None:
        click.echo(f"Error: the argument {os.fsencode(foreign)!r} is not UTF-8", err=True)
        sys.exit(2)
    cli(prog_name="patchbay")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in the code that it came from."""
    click.echo(f"Warning: {message}", err=True)


def _foreign(text: str) -> bool:
    """Whether an argument holds bytes that are no text."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def command(name: str, *parameters: click.Parameter) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of `patchbay`, with `--json`."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.Command(name, params=[*parameters, json_option()], callback=function, help=function.__doc__)
        cli.add_command(made)
        return made

    return decorate


def story_options(default: str | None = "tiny", word: str = "Any model that `show` takes.") -> list[click.Parameter]:
    """The model of a story, and what it draws."""
    return [
        click.Option(
            ["--model"],
            default=default,
            show_default=True,
            metavar="MODEL",
            help=word,
            shell_complete=complete.models,
        ),
        click.Option(
            ["--seed"], type=int, default=0, show_default=True, help="Of prompts, splits and random controls."
        ),
        *model_options(),
    ]


# --- the commands that are no methods -----------------------------------------------------------------


@command(
    "demo",
    *story_options(),
    *page_options("patchbay-demo.html", "Page to write; a knob goes beside it."),
    click.Option(["--n"], type=click.IntRange(8), help="Number of prompts; without it, fewer for larger models."),
)
def demo(model: str, report: str, overwrite: bool, n: int | None, seed: int, as_json: bool, **given: Any) -> None:
    """The whole story in a minute: find the heads, prove it, turn one, see what else changes."""
    from patchbay.draw import screen
    from patchbay.stories import demo as story

    refuse_to_replace_page(report, "patchbay demo", seed, overwrite)
    told = story.tell(load_model(model, given, quiet=as_json), seed=seed, report=report, quiet=as_json, n=n)
    if as_json:
        screen.emit(told)


@command(
    "run",
    click.Argument(["story"], required=False),
    *story_options(None, "Any model that `show` takes; without it `tiny`, or the small network that the story trains."),
    *page_options(None, "Page to write; without it, patchbay-STORY.html."),
    click.Option(["--n"], type=click.IntRange(6), help="Prompts of each kind; without it, fewer for larger models."),
    click.Option(
        ["--folder"], metavar="DIR", help="Where what is trained is kept; a call that was cut off goes on there."
    ),
    click.Option(["--dry-run"], is_flag=True, help="Train nothing, and say what it would cost."),
)
def run_story(
    story: str | None,
    model: str | None,
    report: str | None,
    overwrite: bool,
    n: int | None,
    folder: str | None,
    dry_run: bool,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """What a paper did, end to end, on a model: STORY is demo, talking-heads or one that trains; without one, the stories that there are."""
    from patchbay import stories
    from patchbay.draw import screen

    if story is None:
        rows = [{"story": name, "about": stories.first_line(name)} for name in stories.names()]
        if as_json:
            screen.emit(rows)
        else:
            screen.say(screen.table("stories", ("story", "what it does"), [list(row.values()) for row in rows]))
        return
    tell = stories.story(story)
    page = report or f"patchbay-{story.replace('_', '-')}.html"
    form = stories.own_form(story) if model is None else None
    if form is not None and (asked := [key for key, value in given.items() if value]):
        raise PatchbayError(
            f"{', '.join(asked)} goes with --model: without one, {story} trains a small network of its own"
        )
    trains = {"folder": folder, "dry_run": dry_run} if stories.trains(story) else {}
    if not trains and (folder or dry_run):
        raise PatchbayError(
            f"--folder and --dry-run are of stories that train; {story} trains nothing, and runs in one piece"
        )
    if not dry_run:
        refuse_to_replace_page(page, f"patchbay run {story.replace('_', '-')}", seed, overwrite)
    lent = load_model(model or "tiny", given, quiet=as_json) if form is None else form()
    told = tell(lent, seed=seed, report=page, quiet=as_json, n=n, **trains)
    if as_json:
        screen.emit(told)


@command(
    "show",
    click.Argument(["model"], shell_complete=complete.models),
    click.Argument(["part"], required=False, shell_complete=complete.parts),
    click.Option(
        ["--texts"],
        metavar="FILE",
        help="Texts in which to look for the tokens that excite the part most; a .txt is read line by line.",
    ),
    click.Option(["--roles"], is_flag=True, help="The part's rank in every finder of such parts; runs them."),
    click.Option(["--rows"], type=click.IntRange(1), default=10, show_default=True, help="Contexts to show."),
    *model_options(),
)
def show(model: str, part: str | None, texts: str | None, roles: bool, rows: int, as_json: bool, **given: Any) -> None:
    """What a model is: its shape, its self-check and its parts; or one PART (L3.H5), port (L3.H5.z) or component (L3.H5.C0) of it."""
    from patchbay.draw import screen
    from patchbay.model.cards import model_card

    if part is None and (texts is not None or roles):
        raise PatchbayError("--texts and --roles are of one part: patchbay show MODEL L1.N5 --texts FILE")
    loaded = load_model(model, given, quiet=as_json)
    if part is None:
        screen.emit(model_card(loaded)) if as_json else screen.say(*screen.model_lines(model_card(loaded)))
        return
    with screen.progress(f"finders of {part}", quiet=as_json or not roles) as bar:
        read = None if texts is None else prompt_files.lines(texts, "--texts")
        card = loaded.card(part, texts=read, roles=roles, n=rows, progress=lambda done, total, what: bar(done, total))
    screen.emit(card.data) if as_json else screen.say(*screen.card_lines(card.title, card.sections()))


@command("families", click.Argument(["names"], nargs=-1, metavar="[FAMILY]..."))
def families(names: tuple[str, ...], as_json: bool) -> None:
    """Model families and the ports that each offers, checked now on small random models; exit code 1 if one fails."""
    from patchbay.draw import screen

    with screen.working("loading", quiet=as_json):
        from patchbay.model.check import family_table
        from patchbay.tiny.twins import FAMILY_CONFIGS, twin
    unknown = next((name for name in names if name not in FAMILY_CONFIGS), None)
    if unknown is not None:
        known = list(FAMILY_CONFIGS)
        raise PatchbayError(f"no family {unknown!r} to check; families are {', '.join(known)}{suggest(unknown, known)}")
    rows: list[dict[str, Any]] = []
    asked = list(names) or list(FAMILY_CONFIGS)
    with screen.progress("checking families", quiet=as_json) as bar:
        for i, name in enumerate(asked):
            rows += family_table(twin, [name])
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
    click.Argument(["name"], required=False, shell_complete=complete.tasks),
    click.Argument(["model"], required=False, shell_complete=complete.models),
    click.Option(["--n"], type=int, default=3, show_default=True, help="Prompts to show."),
    *model_options(),
)
def tasks(name: str | None, model: str | None, n: int, as_json: bool, **given: Any) -> None:
    """The tasks and their options; with NAME[:KEY=VALUE,...] and MODEL, the first prompts of one."""
    from patchbay.draw import screen

    if name is None:
        rows = [{"name": one.name, "doc": one.doc, "options": one.options} for one in options.tasks().values()]
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


cli.add_command(why_command.why_command())
cli.add_command(compare_command.compare_command())
cli.add_command(knob_commands.generate)
cli.add_command(knob_commands.knob)
cli.add_command(new.new)
cli.add_command(check_method.check_method)
cli.add_command(harness_command.harness)
cli.add_command(corpus_command.corpus)
cli.add_command(serve_command.serve)
cli.add_command(serve_command.mcp)
cli.add_command(feed_commands.papers)
cli.add_command(ui_command.ui)


@command(
    "replay",
    click.Argument(["folder"]),
    click.Argument(["model"], required=False, shell_complete=complete.models),
    click.Option(
        ["--rtol"],
        type=click.FloatRange(0),
        default=1e-5,
        show_default=True,
        help="Allowed difference over the largest value.",
    ),
    click.Option(
        ["--method", "files"],
        multiple=True,
        metavar="FILE.py[:NAME]",
        help="File of a method that lives outside the package; a Result says where it came from, and runs no code.",
    ),
    *model_options(),
)
def replay(folder: str, model: str | None, rtol: float, files: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Run a saved Result's method again, as recorded, and say whether it agrees; exit code 1 if not."""
    import patchbay as pb
    from patchbay.draw import screen

    saved, methods = pb.load_result(folder), [outside.named(file).load() for file in files]
    source = model or (saved.provenance.get("model") or {}).get("source")
    loaded = load_model(source, given, quiet=as_json) if source else None
    with screen.working("running it again", quiet=as_json):
        outcome = pb.replay(saved, loaded, method=methods, rtol=rtol)
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
