"""`patchbay papers sync`, `feed`, `add`, and letters: what the store takes in and gives out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchbay.cli.new import write_method
from patchbay.cli.papers_commands import day_of, filters, of_papers, opened, papers, wanted
from patchbay.errors import PatchbayError

if TYPE_CHECKING:
    from patchbay.papers.feed.sources import Page
    from patchbay.papers.feed.store import Added, Store

__all__ = ["papers"]  # with the commands of this file
SERVICES = ("hugging-face", "arxiv")
WHOLE = "whole"  # the place after a day of which all was read


# --- taking in and giving out -------------------------------------------------------------------------


@of_papers(
    "sync",
    click.Argument(["sources"], nargs=-1, required=True, metavar="FILE|hugging-face|arxiv..."),
    click.Option(
        ["--since"], metavar="DATE", help="hugging-face: each day from this one on; without it the latest papers."
    ),
    click.Option(
        ["--query"],
        metavar="TEXT",
        default="cat:cs.CL",
        show_default=True,
        help="arxiv: the query, in its API's words.",
    ),
    click.Option(["--endpoint"], metavar="URL", help="Another address of the source, such as a mirror."),
)
def sync(
    sources: tuple[str, ...], since: str | None, query: str, endpoint: str | None, store: str | None, as_json: bool
) -> None:
    """Take papers into the store: saved Daily Papers pages (plain text), Hugging Face's Daily Papers, an arXiv query. What was read
    is kept when it is stopped, and the same call goes on from there."""
    from patchbay.draw import screen
    from patchbay.papers.feed import views

    told: dict[str, Added] = {}
    with opened(store, make=True) as held:
        for source in sources:
            for name, pages in _pages(held, source, since, query, endpoint):
                with screen.working(f"reading {name}", quiet=as_json):
                    for page in pages:
                        added = held.add(page.listed, name, page.place)
                        told[source] = told[source] + added if source in told else added
        total = views.count(held)
        known = held.db.execute("SELECT count(*) FROM papers WHERE key IS NOT NULL").fetchone()[0]
    if as_json:
        screen.emit({source: vars(added) for source, added in told.items()} | {"papers": total})
        return
    for source in sources:
        click.echo(f"{source}: {told.get(source, 'nothing new')}")
    click.echo(f"{total} papers, {known} of them in the catalogue; `patchbay papers WORDS` searches them")


def _pages(
    store: Store, source: str, since: str | None, query: str, endpoint: str | None
) -> Iterator[tuple[str, Iterator[Page]]]:
    """The requests of a source by name, each from where it was left."""
    from patchbay.papers.feed import sources

    other: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
    if source == "hugging-face":
        if since is None:
            yield source, sources.hugging_face(**other)
            return
        today = datetime.now(UTC).date()
        for day in sources.days(day_of(since), today):
            name = f"hugging-face {day}"
            place = store.place(name)
            if place == WHOLE and day < today.isoformat():
                continue
            yield name, sources.hugging_face(day=day, place=None if place == WHOLE else place, **other)
            store.add((), name, WHOLE)
    elif source == "arxiv":
        name = f"arxiv {query}"
        yield name, sources.arxiv(query, place=store.place(name), **other)
    elif Path(source).exists():
        yield source, sources.saved(source)
    else:
        raise PatchbayError(f"no source {source!r}: a file that is there, {' or '.join(SERVICES)}")


@of_papers(
    "feed",
    click.Argument(["words"], nargs=-1),
    click.Option(["--form"], default="atom", show_default=True, metavar="atom|rss|json", help="Of the feed."),
    *filters(),
)
def feed(words: tuple[str, ...], form: str, store: str | None, as_json: bool, **given: Any) -> None:
    """The newest papers that have WORDS as an Atom, RSS or JSON feed, on stdout."""
    from patchbay.papers.feed import published, views

    with opened(store) as held:
        found = views.search(held, " ".join(words), wanted(given))
    newest = sorted(found, key=lambda paper: paper["published"] or "", reverse=True)[: given["rows"]]
    click.echo(published.feed(newest, "json" if as_json else form), nl=False)


@of_papers(
    "add",
    click.Argument(["paper"], metavar="ARXIV|TITLE"),
    click.Option(["--room"], default="find", show_default=True, metavar="ROOM", help="Room of its method."),
    click.Option(["--name"], required=True, metavar="NAME", help="Name of its method."),
    click.Option(
        ["--key"], metavar="KEY", help="Of the catalogue's entry; without it the first author's name and the year."
    ),
)
def add(paper: str, room: str, name: str, key: str | None, store: str | None, as_json: bool) -> None:
    """Begin a paper that the catalogue has not got: its entry, the method's file and tests to be written, in a checkout."""
    from patchbay.papers.feed import views

    with opened(store) as held:
        found = views.one(held, paper)
    if found["key"]:
        raise PatchbayError(
            f"the catalogue has it as {found['key']}; `patchbay new {room} {name} --paper {found['key']}` adds a method"
        )
    write_method(room, name, key or _key(found), found["title"].replace('"', "'").replace("\\", ""), None)


def _key(paper: dict[str, Any]) -> str:
    """Author and year, as the catalogue names its papers."""
    from patchbay.papers.feed.listed import title_key

    if not paper["authors"] or not paper["year"]:
        raise PatchbayError(
            "the store does not know its first author and year: name the entry with --key, as olsson2022"
        )
    letters = "".join(
        letter for letter in title_key(paper["authors"][0].split()[-1]) if letter.isascii() and letter.isalpha()
    )
    return f"{letters or 'paper'}{paper['year']}"


# --- mail ---------------------------------------------------------------------------------------------


@of_papers(
    "subscribe",
    click.Argument(["address"]),
    click.Option(
        ["--daily", "every"],
        flag_value="daily",
        default=True,
        help="A letter a day, where there is something new.  [default]",
    ),
    click.Option(["--weekly", "every"], flag_value="weekly", help="A letter a week."),
    click.Option(["--words"], multiple=True, metavar="TEXT", help="Only papers with any of these words."),
)
def subscribe(address: str, every: str, words: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Send papers that come from now on to ADDRESS; `patchbay papers digest` sends them. Again for one address: its new wishes."""
    from patchbay.draw import screen
    from patchbay.papers.feed import mail

    with opened(store, make=True) as held:
        token = mail.subscribe(held, address, every=every, words=words)
    if as_json:
        screen.emit({"address": address, "every": every, "token": token})
    else:
        click.echo(f"{address}: {every}; `patchbay papers unsubscribe {token}` ends it")


@of_papers("unsubscribe", click.Argument(["token"]))
def unsubscribe(token: str, store: str | None, as_json: bool) -> None:
    """End the subscription of a TOKEN, which each letter holds."""
    from patchbay.draw import screen
    from patchbay.papers.feed import mail

    with opened(store, make=True) as held:
        address = mail.unsubscribe(held, token)
    screen.emit({"address": address}) if as_json else click.echo(f"{address} gets no more letters")


@of_papers(
    "digest",
    click.Option(
        ["--smtp"],
        required=True,
        metavar="URL",
        help="Mail server: smtp://[USER@]HOST[:PORT] or smtps://; its password in $PATCHBAY_SMTP_PASSWORD.",
    ),
    click.Option(["--from", "sender"], required=True, metavar="ADDRESS", help="Who the letters are from."),
)
def digest(smtp: str, sender: str, store: str | None, as_json: bool) -> None:
    """Write the letters that are due, and send what was not sent yet; exit code 1 where some were refused (sent again next time)."""
    from patchbay.draw import screen
    from patchbay.papers.feed import mail

    post = mail.Post.of(smtp, sender, os.environ.get("PATCHBAY_SMTP_PASSWORD", ""))
    with opened(store, make=True) as held:
        told = mail.digest(held, post)
    if as_json:
        screen.emit([{"address": address, "papers": n, "failed": failed} for address, n, failed in told])
    elif not told:
        click.echo("no letter is due")
    else:
        for address, n, failed in told:
            click.echo(f"{address}: {n} papers" + (f", not sent: {failed}" if failed else ""))
    if any(failed for _, _, failed in told):
        raise SystemExit(1)
