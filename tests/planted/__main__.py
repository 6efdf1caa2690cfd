"""`python -m tests.planted`: plants the bugs one at a time in copies of the tree, runs the tests that must notice, prints the share.

Outcomes are kept as they come (`--results`), with a digest of all that they depend on, so that the same call goes on where it
was stopped and runs again only what has changed. A bug is

    noticed   a named test fails, or does not end in its time; what it raised is kept
    survived  they all pass
    argued    they all pass, and the row says why nothing could be observed: it does not count
    broken    the row no longer fits, no test ran, the changed code could not be imported, or its tests fail without it too:
              the row is mended, it does not count as noticed
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.planted import ROOT, Bug, bugs, rows_of, share
from tests.planted.tree import Outcome, Tree

TARGET = 0.97


def git(*command: str) -> str | None:
    """What git says, or None where it cannot (a shallow clone without that commit)."""
    found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else None


def base_of(asked: str) -> str | None:
    """The commit to compare with: what was asked; else where this branch left main; else the commit before this one."""
    head, place = git("rev-parse", "HEAD"), git("merge-base", "HEAD", asked or "main")
    if asked or (place is not None and place != head):
        return place and place.strip()
    before = git("rev-parse", "--verify", "--quiet", "HEAD~1")
    return before and before.strip()


def of_changed(every: Sequence[Bug], base: str) -> list[Bug]:
    """Those whose file or row differs from `base`, committed or not; then those of whose test files one does."""
    files = set((git("diff", "--name-only", base) or "").split())
    rows = [name for name in files if name.startswith("tests/planted/") and name.endswith(".toml")]
    old = {bug for name in rows for bug in rows_of(git("show", f"{base}:{name}") or "")}
    fresh = {bug for bug in every if f"tests/planted/{bug.room}.toml" in rows and bug not in old}
    first = [bug for bug in every if bug.file in files or bug in fresh]
    return first + [bug for bug in every if bug not in first and files & set(bug.test_files)]


def known(path: Path) -> dict[str, Outcome]:
    """Outcomes of earlier calls by key; a last line that was cut off is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[row["key"]] = Outcome(row["what"], row["by"], row["how"])
        except (ValueError, KeyError):
            continue
    return found


def plant(
    chosen: Sequence[Bug], results: Path, jobs: int, seconds: float, each: float = 300, root: Path = ROOT
) -> dict[str, Outcome]:
    """The outcome of each bug by its name; those that the time did not reach are missing."""
    before, end, out = known(results), time.monotonic() + seconds, {}
    keys = {bug: bug.key(root) for bug in chosen}
    left = [bug for bug in chosen if keys[bug] not in before]
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool, results.open("a") as lines:
        every = [Tree(root, Path(folder) / str(job)) for job in range(min(jobs, len(left)))]
        trees: queue.Queue[Tree] = queue.Queue()
        for tree in every:
            trees.put(tree)

        def one(bug: Bug) -> None:
            tree, start = trees.get(), time.monotonic()
            try:
                if start > end:
                    return
                found = tree.plant(bug, each)
            finally:
                trees.put(tree)
            took = round(time.monotonic() - start, 1)
            lines.write(json.dumps({"name": bug.name, "key": keys[bug], **asdict(found), "seconds": took}) + "\n")
            lines.flush()
            before[keys[bug]] = found
            print(f"{found.what:9} {took:6} s  {bug.room}: {bug.name}", flush=True)

        try:
            list(pool.map(one, left))
        finally:
            for tree in every:
                tree.close()
    for bug in chosen:
        if keys[bug] in before:
            out[bug.name] = before[keys[bug]]
    return out


def failing(chosen: Sequence[Bug], root: Path = ROOT) -> set[str]:
    """Of the tests that these name, those that fail without any bug."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(root, Path(folder) / "tree")
        found = tree.run(sorted({test for bug in chosen for test in bug.tests}), 3600, every=True)
        tree.close()
    if found["code"] not in (0, 1):
        raise SystemExit(f"without any bug pytest ends with {found['code']}: nothing can be said")
    return {test.split("[")[0] for test, _ in found["failed"]}


def sound(chosen: Sequence[Bug], found: dict[str, Outcome], root: Path = ROOT) -> dict[str, Outcome]:
    """The outcomes, with `broken` where the test that noticed fails without the bug too."""
    bad = failing([bug for bug in chosen if found.get(bug.name, Outcome("")).what == "noticed"], root)
    return {
        name: Outcome("broken", one.by, "that test fails without the bug too") if one.by.split("[")[0] in bad else one
        for name, one in found.items()
    }


def report(chosen: Sequence[Bug], found: dict[str, Outcome]) -> int:
    """Prints what was not noticed, the share by room and in all; 0 where that meets the target and no row is broken."""
    for bug in chosen:
        if (one := found.get(bug.name)) is not None and one.what in ("survived", "broken"):
            print(
                f"{one.what}: {bug.name}: {bug.file}: {bug.old!r} -> {bug.new!r}" + (f" ({one.how})" if one.how else "")
            )
    rooms = sorted({bug.room for bug in chosen})
    for room in rooms if len(rooms) > 1 else ():
        of = [found[bug.name].what for bug in chosen if bug.room == room and bug.name in found]
        print(f"{room:10} {sum(what == 'noticed' for what in of):4} of {len(of):4}")
    what = [one.what for one in found.values()]
    raised = Counter(one.how for one in found.values() if one.what == "noticed")
    print("noticed by: " + ", ".join(f"{how} {n}" for how, n in raised.most_common()))
    more = {"argued": what.count("argued"), "not run": len(chosen) - len(found)}
    aside = "".join(f", {n} {kind}" for kind, n in more.items() if n)
    print(f"{share(what):.1%} of {len(what) - more['argued']} planted bugs noticed{aside}")
    return 0 if share(what) >= TARGET and "broken" not in what else 1


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.planted", description="Plants bugs; says which share is noticed."
    )
    add = parser.add_argument
    add("names", nargs="*", help="only bugs whose name, file or method holds one of these")
    add(
        "--changed",
        nargs="?",
        const="",
        metavar="BASE",
        help="only bugs of what differs from BASE (main, or the last commit)",
    )
    add("--jobs", type=int, default=2)
    add("--seconds", type=float, default=float("inf"), help="start no bug after that many seconds")
    add("--each", type=float, default=300, help="the longest that the tests of one bug may take, in seconds")
    add("--results", type=Path, default=ROOT / "report" / "planted.jsonl")
    add("--trust", action="store_true", help="do not run the tests that noticed once more without any bug")
    args = parser.parse_args(given)
    chosen = [
        bug
        for bug in bugs()
        if not args.names or any(n in bug.name or n in bug.file or n in bug.belongs_to for n in args.names)
    ]
    if args.changed is not None:
        if (base := base_of(args.changed)) is None:
            print(f"no commit {args.changed or 'before this one'} here: no planted bugs are run")
            return 0
        chosen = of_changed(chosen, base)
    if not chosen:
        print("no planted bugs to run")
        return 0
    start = time.monotonic()
    found = plant(chosen, args.results, args.jobs, args.seconds, args.each)
    found = found if args.trust or not found else sound(chosen, found)
    code = report(chosen, found)
    print(f"in {time.monotonic() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
