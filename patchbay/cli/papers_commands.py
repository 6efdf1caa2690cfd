"""`patchbay papers`: the papers that are published and what of them runs here; search, one paper, its claim, and the feed.

`patchbay papers WORDS` searches. The store is a file of this user (`--store FILE` or $PATCHBAY_PAPERS name another); without one
the catalogue's papers are there all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import click

from patchbay.cli import complete
from patchbay.cli.commands import Commands, json_option, load_model, model_options
from patchbay.errors import PatchbayError

if TYPE_CHECKING:
    from patchbay.papers.feed.store import Store

SHOWN = ("key", "arxiv", "title", "year", "published", "likes", "state", "methods", "kind", "marked")


class Papers(Commands):
    """The group, in which words that are no command are searched for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["search", *args]
        return super().parse_args(ctx, args)


@click.group("papers", cls=Papers, help=__doc__)
def papers() -> None:
    pass


def of_papers(name: str, *parameters: click.Parameter) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group, with `--store` and `--json`."""

    def decorate(function: Callable[..., None]) -> click.Command:
        store = click.Option(["--store"], metavar="FILE", help="The store of papers (default: this user's).")
        made = click.Command(name, params=[*parameters, store, json_option()], callback=function, help=function.__doc__)
        papers.add_command(made)
        return made

    return decorate


def filters() -> list[click.Parameter]:
    return [
        click.Option(["--kind"], metavar="KIND", help="Only of this kind, such as mechanism or evaluation."),
        click.Option(["--state"], metavar="STATE", help='Only in this state: "runs here", works, partly, unmeasured, "not yet", "not a system".'),
        click.Option(["--method"], metavar="ROOM.NAME", help="Only those that this method implements."),
        click.Option(["--measured-on", "on"], metavar="MODEL", help="Only those whose claim was measured on this model."),
        click.Option(["--marked"], is_flag=True, help="Only marked ones."),
        click.Option(["--rows"], type=click.IntRange(1), default=20, show_default=True, help="Papers to list."),
    ]  # fmt: skip


def opened(store: str | None, *, make: bool = False) -> Store:
    from patchbay.papers.feed import opened as feed

    return feed.opened(store, make=make)


def wanted(given: dict[str, Any]) -> Any:
    from patchbay.papers.feed.views import Filters

    return Filters(given["kind"], given["state"], given["method"], given["on"], given["marked"])


def _list(found: Sequence[dict[str, Any]], given: dict[str, Any], caption: str = "") -> None:
    from patchbay.draw import papers_shown, screen

    if given["as_json"]:
        screen.emit([{name: paper[name] for name in SHOWN} for paper in found])
    else:
        screen.say(papers_shown.papers_table(found, given["rows"], caption=caption))


# --- looking ------------------------------------------------------------------------------------------


@of_papers("search", click.Argument(["words"], nargs=-1), *filters())
def search(words: tuple[str, ...], store: str | None, **given: Any) -> None:
    """Papers in which every one of WORDS occurs, best first; the last may be begun only. Without words, all."""
    from patchbay.papers.feed import views

    with opened(store) as held:
        found = views.search(held, " ".join(words), wanted(given))
        if not found and not given["as_json"]:
            raise PatchbayError(
                f"no paper has all of {' '.join(words)!r}; fewer words or filters find more of {views.count(held)}"
            )
    _list(found, given)


@of_papers(
    "list",
    click.Option(["--day"], metavar="DATE", help="Published on this day, as 2025-10-29; `today`."),
    click.Option(["--week"], metavar="DATE", help="Published in the week that holds this day."),
    click.Option(
        ["--month"], metavar="DATE", help="Published in the month that holds this day, as 2025-10-29 or 2025-10."
    ),
    click.Option(["--trending"], is_flag=True, help="By likes / (1 + days since publication), the most first."),
    *filters(),
)
def list_papers(
    day: str | None, week: str | None, month: str | None, trending: bool, store: str | None, **given: Any
) -> None:
    """Papers of a day, a week or a month, the newest first, or those that are liked now; says where earlier and later ones are."""
    from patchbay.papers.feed import views

    asked = [(of, text) for of, text in (("day", day), ("week", week), ("month", month)) if text is not None]
    if len(asked) + trending != 1:
        raise PatchbayError("give one of --day, --week, --month and --trending")
    with opened(store) as held:
        if trending:
            _list(views.trending(held, wanted(given), limit=given["rows"]), given)
            return
        ((of, text),) = asked
        first, last = views.period(day_of(text), of)
        before, after = views.beside(held, first, last)
        found = views.between(held, first, last, wanted(given))
    near = [f"{word}: --{of} {at}" for word, at in (("earlier", before), ("later", after)) if at is not None]
    _list(found, given, "; ".join([f"{first} to {last}" if first != last else str(first), *near]))


def day_of(text: str) -> date:
    if text == "today":
        return datetime.now(UTC).date()
    try:
        return date.fromisoformat(f"{text}-01" if len(text) == 7 else text)
    except ValueError as error:
        raise PatchbayError(f"{text!r} is no day; one is like 2025-10-29, or today") from error


@of_papers("show", click.Argument(["paper"], metavar="KEY|ARXIV|TITLE"))
def show(paper: str, store: str | None, as_json: bool) -> None:
    """One paper: what it does, its abstract, what of it runs here, its claim, and what was measured."""
    from patchbay.draw import papers_shown, screen
    from patchbay.papers import catalogue
    from patchbay.papers.feed import views

    with opened(store) as held:
        found = views.one(held, paper)
        likes, judged = views.liked(held, found), held.verdicts(found["key"] or "-").get(found["key"], [])
    entry = catalogue.paper(found["key"]) if found["key"] else None
    if as_json:
        screen.emit({**found, **(entry or {}), "likes_by_day": likes, "verdicts": judged})
    else:
        screen.say(*papers_shown.paper_lines(found, entry))
        for one in judged:
            screen.say(f"checked on {one['model']} ({one['weights']}), {one['at'][:10]}: {one['verdict']}")


@of_papers(
    "similar",
    click.Argument(["paper"], metavar="KEY|ARXIV|TITLE"),
    click.Option(["--rows"], type=click.IntRange(1), default=10, show_default=True, help="Papers to list."),
)
def similar(paper: str, store: str | None, **given: Any) -> None:
    """Papers that share the words that mark this one (tf-idf in the store)."""
    from patchbay.papers.feed import views

    with opened(store) as held:
        found = views.similar(held, views.one(held, paper), limit=given["rows"])
    _list(found, given)


@of_papers(
    "mark",
    click.Argument(["names"], nargs=-1, required=True, metavar="KEY|ARXIV|TITLE..."),
    click.Option(["--off"], is_flag=True, help="Take the marks away."),
)
def mark(names: tuple[str, ...], off: bool, store: str | None, as_json: bool) -> None:
    """Mark papers, for `--marked`."""
    from patchbay.draw import screen
    from patchbay.papers.feed import views

    with opened(store, make=True) as held:
        found = [views.one(held, name) for name in names]
        for paper in found:
            held.mark(paper["id"], not off)
    titles = [paper["title"] for paper in found]
    screen.emit(titles) if as_json else click.echo(
        "\n".join(f"{'unmarked' if off else 'marked'} {one}" for one in titles)
    )


def _kept(store: str | None, key: str, model: str, loaded: Any, outcome: Any) -> None:
    """The verdict beside the paper, where there is a store to keep it."""
    from patchbay.papers.feed.opened import usual_path

    if store is not None or usual_path().exists():
        lines = [f"{outcome.verdict}: {outcome.first.text}", *(line.strip() for line in outcome.told())]
        with opened(store) as held:
            held.judged(key, model, str(loaded.fingerprint)[:16], outcome.verdict, "\n".join(lines))


@of_papers(
    "run",
    click.Argument(["key"], metavar="KEY"),
    click.Option(["--model"], metavar="MODEL", help="Where the claim is checked (default: the claim's own model).", shell_complete=complete.models),
    click.Option(["--seed"], type=int, default=0, show_default=True, help="The first of three, of what is drawn."),
    *model_options(),
)  # fmt: skip
def run(key: str, model: str | None, seed: int, store: str | None, as_json: bool, **given: Any) -> None:
    """Check a paper's claim on a model; exit code 1 if it is not confirmed."""
    from patchbay.draw import papers_shown, screen
    from patchbay.papers import catalogue, claims

    catalogue.paper(key)
    model = model or claims.known(key).on
    loaded = load_model(model, given, quiet=as_json)
    with screen.working(f"checking {key} on {model}", quiet=as_json):
        outcome = claims.check(key, loaded, seed=seed)
    _kept(store, key, model, loaded, outcome)
    screen.emit(outcome.to_json()) if as_json else screen.say(*papers_shown.claim_lines(outcome))
    if outcome.verdict != "confirmed":
        raise SystemExit(1)
