"""`python -m tests.planted`: plants the bugs one at a time in copies of the tree, runs the tests that must notice, prints the share.

Outcomes are kept as they come (`--results`), with a digest of all that they depend on, so that the same call goes on where it
was stopped and runs again only what has changed. A bug is

    noticed   a named test fails (or hangs)
    survived  they all pass
    broken    the row no longer fits, or the tests do not run: the row is mended, it does not count as noticed
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.planted import ROOT, Bug, bugs, share

TARGET = 0.97
COPIED = ("patchbay", "tests", "docs", "bench")
FILES = ("pyproject.toml", "README.md", "constraints.txt", "Makefile")


def copy_of(root: Path, into: Path) -> Path:
    """The part of the tree that tests need."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        if (root / name).exists():
            shutil.copy2(root / name, into / name)
    return into


class Tree:
    """A copy of the tree, and the process that runs tests in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = copy_of(root, folder)
        shared = os.environ.get("PATCHBAY_SHARED", str(ROOT.parent / "shared"))
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATCHBAY_SHARED": shared}
        command = [sys.executable, "-B", "-m", "tests.planted.worker", str(folder)]
        pipe = subprocess.PIPE
        self.worker = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """pytest's exit code for these tests, and the first that failed."""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(json.dumps(list(tests)) + "\n")
        self.worker.stdin.flush()
        found = json.loads(self.worker.stdout.readline())
        return found["code"], found["failed"]

    def plant(self, bug: Bug) -> tuple[str, str]:
        """The outcome of one bug, and the test that noticed it; the copy is left as it was."""
        path = self.folder / bug.file
        whole = path.read_text(encoding="utf-8")
        try:
            planted = bug.planted(whole)
            compile(planted, bug.file, "exec")
        except (ValueError, SyntaxError):
            return "broken", ""
        path.write_text(planted, encoding="utf-8")
        try:
            code, by = self.run(bug.tests)
            return {0: "survived", 1: "noticed"}.get(code, "broken"), by
        finally:
            path.write_text(whole, encoding="utf-8")

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self.worker.wait()
        assert self.worker.stdout is not None
        self.worker.stdout.close()


def changed_files(base: str) -> set[str]:
    """Files that differ from `base`, committed or not."""
    found = subprocess.run(["git", "diff", "--name-only", base], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def known(path: Path) -> dict[str, str]:
    """Outcomes of earlier calls by key; a last line that was cut off is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[row["key"]] = row["outcome"]
        except ValueError:
            continue
    return found


def plant(chosen: Sequence[Bug], results: Path, jobs: int, seconds: float, root: Path = ROOT) -> dict[str, str]:
    """The outcome of each bug by its name; those that the time did not reach are missing."""
    before, end, out = known(results), time.monotonic() + seconds, {}
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool, results.open("a") as lines:
        every = [Tree(root, Path(folder) / str(job)) for job in range(min(jobs, len(chosen)))]
        trees: queue.Queue[Tree] = queue.Queue()
        for tree in every:
            trees.put(tree)

        def one(bug: Bug) -> None:
            key = bug.key(root)
            if key not in before:
                tree, start = trees.get(), time.monotonic()
                try:
                    if start > end:
                        return
                    found, by = tree.plant(bug)
                finally:
                    trees.put(tree)
                row = {
                    "name": bug.name,
                    "key": key,
                    "outcome": found,
                    "by": by,
                    "seconds": round(time.monotonic() - start, 1),
                }
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                before[key] = found
                print(f"{found:9} {row['seconds']:6} s  {bug.name}", flush=True)
            out[bug.name] = before[key]

        list(pool.map(one, chosen))
        for tree in every:
            tree.close()
    return out


def healthy(chosen: Sequence[Bug]) -> bool:
    """Whether the named tests pass without any bug."""
    tests = sorted({test for bug in chosen for test in bug.tests})
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(ROOT, Path(folder) / "tree")
        code, by = tree.run(tests)
        tree.close()
    if code:
        print(f"without any bug: {by or f'pytest ends with {code}'}")
    return code == 0


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.planted", description="Plants bugs; says which share is noticed."
    )
    parser.add_argument("names", nargs="*", help="only bugs whose name or file holds one of these")
    parser.add_argument(
        "--changed", nargs="?", const="HEAD~1", metavar="BASE", help="only bugs of files that differ from BASE"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no bug after that many seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "planted.jsonl")
    parser.add_argument("--check", action="store_true", help="first run all named tests without a bug")
    args = parser.parse_args(given)
    chosen = [bug for bug in bugs() if not args.names or any(n in bug.name or n in bug.file for n in args.names)]
    if args.changed is not None:
        files = changed_files(args.changed)
        chosen = [bug for bug in chosen if bug.file in files]
    if args.check and chosen and not healthy(chosen):
        print("the named tests fail without any bug: nothing can be said")
        return 2
    found = plant(chosen, args.results, args.jobs, args.seconds)
    for kind in ("survived", "broken"):
        for bug in chosen:
            if found.get(bug.name) == kind:
                print(f"{kind}: {bug.name}: {bug.file}: {bug.old!r} -> {bug.new!r}")
    left = len(chosen) - len(found)
    print(
        f"{share(list(found.values())):.1%} of {len(found)} planted bugs noticed"
        + (f", {left} not run" if left else "")
    )
    return 0 if share(list(found.values())) >= TARGET and "broken" not in found.values() else 1


if __name__ == "__main__":
    sys.exit(main())
