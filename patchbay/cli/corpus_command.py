"""`patchbay corpus ...`: tools for texts in files, which are read as streams; what is written is a .jsonl with a field `text`, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from patchbay.cli.commands import Commands, json_option
from patchbay.signal.port import PatchbayError

OUT = click.Option(["--out", "-o"], metavar="FILE", help="A .jsonl to write; without, texts go to stdout.")
OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="Replace a file that is there.")
FILE = click.Argument(["file"])


def _written(records: Iterable[Mapping[str, Any]], *, out: str | None, overwrite: bool, as_json: bool) -> None:
    """Records into a file, or onto the screen; an empty corpus is an error."""
    n = 0

    def lines() -> Iterable[str]:
        nonlocal n
        for record in records:
            n += 1
            said = record.get("text")
            whole = as_json or out is not None or not isinstance(said, str)
            yield json.dumps(dict(record), ensure_ascii=False) if whole else str(said)
        if not n:
            raise PatchbayError("no text is left: nothing was written")

    if out is None:
        for line in lines():
            click.echo(line)
        return
    if not out.endswith(".jsonl"):
        raise PatchbayError(f"{out}: texts are written as a .jsonl")
    if Path(out).exists() and not overwrite:
        raise PatchbayError(f"{out} is already there; --overwrite replaces it")

    def fill(path: Path) -> None:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines())

    from patchbay.draw import screen
    from patchbay.files import write_file

    with screen.working(f"writing {out}", quiet=as_json):
        write_file(out, fill)
    click.echo(json.dumps({"written": out, "texts": n}) if as_json else f"{n} texts: {out}")


def _stories(n: int, seed: int, **written: Any) -> None:
    """Short stories from a seeded grammar, of which it is known what is right."""
    import patchbay as pb

    _written(({"text": text} for text in pb.corpus.stories.texts(n, seed=seed)), **written)


def _grade(file: str, as_json: bool) -> None:
    """How far the texts of FILE are such stories: sentences that parse, and speak of the two people of their opening."""
    import patchbay as pb
    from patchbay.draw import screen

    with screen.working(f"reading {file}", quiet=as_json):
        found = pb.corpus.stories.graded(list(pb.corpus.texts_of(file)))
    screen.emit(found) if as_json else screen.say(
        screen.table("means over texts", ("what", "share"), [list(row) for row in found.items()])
    )


def _tag(file: str, **written: Any) -> None:
    """What every tagger says of each text of FILE: a record a line, which `patchbay corpus filter --attributes` reads."""
    import patchbay as pb

    _written((pb.corpus.mixer.attributes(text) for text in pb.corpus.texts_of(file)), **written)


def _rules(keep: tuple[str, ...]) -> list[tuple[str, float | None, float | None]]:
    found = []
    for text in keep:
        name, *ends = text.split(":")
        try:
            least, most = (float(end) if end else None for end in ends)
            if not any(ends) or any(end is not None and end != end for end in (least, most)):
                raise ValueError
        except ValueError:
            raise PatchbayError(
                f"--keep {text!r}: a rule is NAME:LEAST:MOST, such as length:20: or repeated_lines::0.3"
            ) from None
        found.append((name, least, most))
    return found


def _filter(file: str, keep: tuple[str, ...], attributes: str | None, mask: bool, **written: Any) -> None:
    """The texts of FILE that keep every rule, in their order, with what else their records hold."""
    import patchbay as pb

    rules, records = _rules(keep), pb.corpus.records_of(file)
    if not rules and not mask:
        raise PatchbayError(
            f"nothing to filter by: give --keep NAME:LEAST:MOST or --mask; names are {', '.join(pb.corpus.mixer.TAGGERS)}"
        )
    if attributes is None:
        keeps = pb.corpus.mixer.keeping(rules)
        left: Iterator[dict[str, Any]] = (record for record in records if keeps(record["text"]))
    else:
        left = pb.corpus.mixer.kept(records, pb.corpus.mixer.told(attributes), rules)
    _written(({**one, "text": pb.corpus.mixer.masked(one["text"])} if mask else one for one in left), **written)


def _unique(file: str, unit: str, capacity: int, rate: float, **written: Any) -> None:
    """Each text of FILE once, or each paragraph, or each record by its url; what else a record holds stays with it."""
    import patchbay as pb

    if unit == "url":
        _written(pb.corpus.dedup.unique_by(pb.corpus.records_of(file), "url", capacity=capacity, rate=rate), **written)
        return
    once = pb.corpus.dedup.unique_records
    _written(once(pb.corpus.records_of(file), unit=unit, capacity=capacity, rate=rate), **written)  # type: ignore[arg-type]


def _mixture(
    tokenizer: str, samples: tuple[str, ...], merges: int, competitors: int, draws: int, seed: int, as_json: bool
) -> None:
    """How much of which kind of text a tokenizer was trained on, from the order of its merges and KIND=FILE of each kind."""
    from dataclasses import asdict

    import patchbay as pb
    from patchbay.draw import screen

    named = [text.partition("=") for text in samples]
    if wrong := [text for text, (name, _, file) in zip(samples, named, strict=True) if not name or not file]:
        raise PatchbayError(f"{wrong[0]!r}: a sample is KIND=FILE, such as code=code.txt")
    names = [name for name, _, _ in named]
    if len(set(names)) < len(names):
        raise PatchbayError(
            f"{next(n for n in names if names.count(n) > 1)!r} is the name of two samples: each kind has one file"
        )
    path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    with screen.working("counting pairs and solving", quiet=as_json):
        found = pb.corpus.mixture.infer(
            path,
            {name: pb.corpus.texts_of(file) for name, _, file in named},
            merges=merges,
            competitors=competitors,
            draws=draws,
            seed=seed,
        )
    if as_json:
        screen.emit(asdict(found))
        return
    rows = [[name, share, found.least[name], found.most[name], *([found.low[name], found.high[name]] if found.low and found.high else ["", ""])]
            for name, share in found.shares.items()]  # fmt: skip
    columns = ("kind", "share of pairs", "least", "most", "95 % low", "95 % high")
    said = f"slack {found.slack:.3g}, of merges in another order {found.shuffled:.3g}; {found.merges} merges, {found.rows} comparisons"
    if found.slack > found.shuffled / 2:
        said += ". The best mixture is not half as far off as that null: no mixture of these samples explains the order of the merges, and the shares say little"
    screen.say(screen.table("mixture", columns, rows, caption=said))


def _made(name: str, function: Any, *params: click.Parameter) -> click.Command:
    own = [] if any(param.name == "as_json" for param in params) else [json_option()]
    return click.Command(name, params=[*params, *own], callback=function, help=function.__doc__)


LINES = click.Option(
    ["--json", "as_json"],
    is_flag=True,
    help="Print records, a JSON document a line; with --out one of what was written.",
)
WRITTEN = (OUT, OVERWRITE, LINES)


SEED = click.Option(["--seed"], type=int, default=0, show_default=True, help="Of what is drawn.")
COMMANDS = (
    _made("stories", _stories, click.Option(["--n"], type=click.IntRange(1), default=10, show_default=True, help="Stories."), SEED, *WRITTEN),
    _made("grade", _grade, FILE),
    _made("tag", _tag, FILE, *WRITTEN),
    _made(
        "filter", _filter, FILE,
        click.Option(["--keep"], multiple=True, metavar="NAME:LEAST:MOST", help="A rule on what a tagger says; may be given again, and either end left out."),
        click.Option(["--attributes"], metavar="FILE", help="What `patchbay corpus tag` wrote of the texts; without, taggers are asked."),
        click.Option(["--mask"], is_flag=True, help="Put what it is in the place of addresses and telephone numbers."),
        *WRITTEN,
    ),
    _made(
        "unique", _unique, FILE,
        click.Option(["--unit"], type=click.Choice(["text", "paragraph", "url"]), default="text", show_default=True, help="What is there once."),
        click.Option(["--capacity"], type=click.IntRange(1), default=1_000_000, show_default=True, help="Different ones that there may be."),
        click.Option(["--rate"], type=float, default=1e-4, show_default=True, help="Share of new ones that may be dropped by chance."),
        *WRITTEN,
    ),
    _made(
        "mixture", _mixture, click.Argument(["tokenizer"]), click.Argument(["samples"], nargs=-1, metavar="KIND=FILE..."),
        click.Option(["--merges"], type=click.IntRange(1), default=300, show_default=True, help="Merges that are asked."),
        click.Option(["--competitors"], type=click.IntRange(1), default=15, show_default=True, help="Pairs of each kind that the merged one had to beat."),
        click.Option(["--draws"], type=click.IntRange(0), default=0, show_default=True, help="Samples drawn again, for an interval."),
        SEED,
    ),
)  # fmt: skip
corpus = Commands("corpus", commands={str(one.name): one for one in COMMANDS}, help="Tools for texts in files.")
