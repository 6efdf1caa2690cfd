"""`python -m bench.claims [KEY ...]`: check the claims of papers, each on its own model, and write what came of them into papers.toml.

Every claim is run as `patchbay papers run KEY` runs it. Lessons that a claim needs are taught first, into a folder of their own.
docs/papers.md is written from the rows afterwards. Prints a line for each claim as it ends: seconds, state before and now.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import patchbay as pb
from patchbay.papers import catalogue, claims

TOML = Path(catalogue.__file__).with_name("papers.toml")
PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
LESSONS = {  # a model that no wheel holds -> the module that makes it
    "intent": "patchbay.tiny.lessons intent --base tiny",
    "binding": "patchbay.tiny.lessons binding --base tiny-llama",
    "refusal": "patchbay.tiny.lessons refusal --base tiny",
    "domains": "patchbay.tiny.domains horizontal",
    "refusal-1": "patchbay.tiny.lessons refusal --base tiny --seed 1",
    "unrefused": "patchbay.tiny.lessons unrefused --base tiny",
}
BESIDE = {  # model of a claim -> what else it is asked of, with its seeds: how it is called in the row, and the model
    "refusal": {"a second lesson": "refusal-1", "as many steps without a refusal": "unrefused"},
}


def load(name: str, folder: Path) -> pb.Model:
    """A built-in model, or one that a lesson teaches."""
    if name not in LESSONS:
        return pb.load(name)
    out = folder / name
    if not out.is_dir():
        command = [sys.executable, "-m", *LESSONS[name].split(), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return pb.load(str(out))


def written(text: str, key: str, measured: str, model: str) -> str:
    """papers.toml with the row of one paper as it was found now."""
    start = text.index(f'key = "{key}"')
    end = text.find("[[paper]]", start)
    row, rest = (text[start:end], text[end:]) if end > 0 else (text[start:], "")
    for name, value in (("measured", measured), ("model", model), ("command", command(key, model))):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        found = re.search(rf"^{name} = .*$", row, flags=re.MULTILINE)
        if found is None:  # a paper that was not measured before
            row = f'{row.rstrip()}\n{name} = "{quoted}"\n' + "\n" * (end > 0)
            continue
        row = f'{row[: found.start()]}{name} = "{quoted}"{row[found.end() :]}'
    return text[:start] + row + rest


def beside(found: claims.Checked, folder: Path) -> str:
    """What the claim's number is on models that were taught otherwise, for each of its seeds."""
    entry, told = claims.known(found.key), ""
    for said, name in BESIDE.get(entry.on, {}).items():
        model, values = load(name, folder), []
        for seed in found.seeds:
            try:
                one = entry.measure(model, seed)
                values.append(f"{one.value:.3g} ({one.verdict})")
            except pb.PatchbayError as error:
                values.append(f"none ({error})")
        told += f"; {said} ({name}) {values[0] if len(set(values)) == 1 else ', '.join(values)}"
    return told


def command(key: str, model: str) -> str:
    return f"patchbay papers run {key} --model {model}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="papers whose claims are checked (default: all)")
    parser.add_argument("--lessons", type=Path, help="a folder with models that lessons taught, or for them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patchbay-claims-") as made:
        folder = given.lessons or Path(made)
        for key in given.keys or sorted(claims.CLAIMS):
            name, start = claims.known(key).on, time.perf_counter()
            try:
                found = claims.check(key, load(name, folder))
            except pb.PatchbayError as error:
                print(f"{key} on {name}: refused: {error}", flush=True)
                continue
            before = str(catalogue.paper(key).get("measured", "new")).split(":")[0]
            how = f" (python -m {LESSONS[name]} --out {name})" if name in LESSONS else ""
            row = f"{found.verdict}: {found.numbers()}{beside(found, folder)}. {found.first.text[0].upper()}{found.first.text[1:]}{how}"
            TOML.write_text(written(TOML.read_text(encoding="utf-8"), key, row, name), encoding="utf-8")
            print(
                f"{key} on {name}: {before} -> {found.verdict}, {time.perf_counter() - start:.0f} s: {found.numbers()}",
                flush=True,
            )
    catalogue.papers.cache_clear()
    PAGE.write_text(catalogue.page(), encoding="utf-8")


if __name__ == "__main__":
    main()
