"""Much at once: signals of many positions to disk, weights to fingerprints, runs in threads.

"trace" is `pb.run` of a GPT-2 of one layer, 768 wide, into a folder, one residual stream tapped, against the same batches run one after
the other without taps or folder; every pair runs prompts of its own; the cpu clock does not count waiting for the disk. "long" is the same with
several shards in one call, and says by how much the peak of resident memory stands above the start, without and with the folder. "million" is the same
with a million positions of a smaller model (an MLP of 768, 512 tokens), an eighth of them run alone before and an eighth after: its left column is four times the sum. "fingerprint" is the fingerprint of that model against SHA-256 of
the same bytes, "kept fingerprint" a kept one, checked, against computing it. "threads" is untapped runs of a small random model in
two threads against as many in one, with one torch thread each: 0.5 is twice the throughput, and only free cores can show it; the
note has what plain Hugging Face's own runs gain, which is the most that there is.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import patchbay as pb
from bench import clock
from bench.clock import Comparison, compare
from bench.report import Row, timed
from bench.shapes import prompts
from patchbay.model import recalled
from patchbay.model.fingerprint import fingerprint_of, version_of
from patchbay.model.run import TOGETHER
from patchbay.tiny.twins import twin

PARTS = ("trace", "long", "million", "fingerprint", "threads")
TARGETS = {"trace": 1.2, "fingerprint": 0.33, "kept": 0.5, "threads": 1 / 1.6}
PROMPTS, POSITIONS, PAIRS = 200, 128, 4
LONG = 1024  # prompts of the long trace: several shards
MILLION = 8192  # prompts of the longest
RUNS = 40
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows, one at a time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=1)
    hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)
    if "trace" in parts:
        yield _trace(folder, pb.load(hf), device)
    if "long" in parts:
        yield _long(folder, pb.load(hf), device)
    if "million" in parts:
        small = AutoConfig.for_model("gpt2", n_layer=1, n_inner=768, vocab_size=512, bos_token_id=0, eos_token_id=0)
        yield _million(folder, pb.load(AutoModelForCausalLM.from_config(small, dtype=dtype).eval().to(device)), device)
    if "fingerprint" in parts:
        yield from _fingerprint(folder, hf, seconds)
    if "threads" in parts:
        yield _threads(device, seconds)


def _trace(folder: Path, model: pb.Model, device: str) -> Row:
    port, first, second = model.layers[0].resid_out, itertools.count(), itertools.count()
    ids = prompts(PROMPTS * (PAIRS + 1), POSITIONS, model.vocab_size, device).split(PROMPTS)

    def alone() -> None:
        for some in ids[next(first)].split(TOGETHER):
            pb.run(model, some, logits="last")

    def to_disk() -> Any:
        i = next(second)
        return pb.run(model, ids[i], taps=[port], folder=folder / f"trace-{i}")

    _ = model.fingerprint
    found = compare(alone, to_disk, seconds=0, least=PAIRS, most=PAIRS, warm=1)
    megabytes = PROMPTS * POSITIONS * model.d_model * model.hf.dtype.itemsize / 1e6
    note = f"{PAIRS} pairs of {PROMPTS * POSITIONS:,} positions, {megabytes:.0f} MB each"
    return timed("trace to disk", "gpt2, one layer", f"{PROMPTS} x {POSITIONS}", found, TARGETS["trace"], note)


def _long(folder: Path, model: pb.Model, device: str) -> Row:
    """Two pairs; what is in memory does not grow with what is on disk."""
    port, count = model.layers[0].resid_out, itertools.count()
    ids = prompts(LONG, POSITIONS, model.vocab_size, device)
    grown: dict[str, list[float]] = {"alone": [], "to disk": []}
    warm = dict.fromkeys(grown, True)

    def some(name: str) -> torch.Tensor:
        """All prompts, but two batches in the first run of each, which warms up."""
        first, warm[name] = warm[name], False
        return ids[: 2 * TOGETHER] if first else ids

    def alone() -> None:
        with _peak(grown["alone"]):
            for batch in some("alone").split(TOGETHER):
                pb.run(model, batch, logits="last")

    def to_disk() -> None:
        with _peak(grown["to disk"]):
            pb.run(model, some("to disk"), taps=[port], folder=folder / f"long-{next(count)}")

    _ = model.fingerprint
    found = compare(alone, to_disk, seconds=0, least=2, most=2, warm=1)
    n = LONG * POSITIONS
    size, rate = n * model.d_model * model.hf.dtype.itemsize / 1e6, n / min(found.ours)
    memory = ", ".join(f"{name} +{max(each):.0f} MB" for name, each in grown.items() if each)
    note = f"{n:,} positions, {size:.0f} MB on disk, {rate:,.0f} positions/s, 10 million in {1e7 / rate / 60:.0f} min; peak memory {memory or 'unknown'}"
    return timed("trace to disk, long", "gpt2, one layer", f"{LONG} x {POSITIONS}", found, TARGETS["trace"], note)


def _million(folder: Path, model: pb.Model, device: str) -> Row:
    """A million positions once, between two eighths of them without taps or folder; every number on disk is there."""
    port, grown = model.layers[0].resid_out, list[float]()
    ids = prompts(MILLION, POSITIONS, model.vocab_size, device)
    before, after = ids[: MILLION // 8], ids[-MILLION // 8 :]

    def alone(some: torch.Tensor) -> float:
        begin = clock.now()
        for batch in some.split(TOGETHER):
            pb.run(model, batch, logits="last")
        return clock.now() - begin

    pb.run(model, ids[: 2 * TOGETHER], taps=[port], folder=folder / "warm")  # and the model's fingerprint
    alone(ids[: 2 * TOGETHER])
    sides = [alone(before)]
    begin = clock.now()
    with _peak(grown):
        trace = pb.run(model, ids, taps=[port], folder=folder / "million")
    took = clock.now() - begin
    sides.append(alone(after))
    size = sum(path.stat().st_size for path in (folder / "million").iterdir())
    some = pb.run(model, ids[-TOGETHER:], taps=[port])[port].flatten(0, 1)
    if not torch.equal(trace.rows(port, trace.n_rows - len(some)), some.cpu()):
        raise AssertionError("the last rows on disk are not those of a run in memory")
    rate = trace.n_rows / took
    memory = f"+{grown[0]:.0f} MB" if grown else "unknown"
    note = (
        f"{trace.n_rows:,} positions, {size / 1e6:.0f} MB on disk, {rate:,.0f} positions/s; 10 million: {size * 1e7 / trace.n_rows / 1e9:.0f} GB "
        f"in {1e7 / rate / 60:.0f} min; peak memory {memory}; alone {8 * sides[0]:.0f} s by the first eighth, {8 * sides[1]:.0f} s by the last"
    )
    return timed(
        "trace to disk, a million",
        "gpt2, one layer, MLP 768",
        f"{MILLION} x {POSITIONS}",
        Comparison((4 * sum(sides),), (took,)),
        TARGETS["trace"],
        note,
    )


@contextmanager
def _peak(into: list[float]) -> Iterator[None]:
    """Append by how many MB the resident set rose above what it was, at most; nothing where the kernel does not say."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.is_file():
        yield
        return

    def read(name: str) -> float:
        return next(float(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if line.startswith(name))

    clear.write_text("5")  # the peak starts anew
    before = read("VmRSS")
    yield
    into.append(read("VmHWM") - before)


def _fingerprint(folder: Path, hf: Any, seconds: float) -> Iterator[Row]:
    state = hf.state_dict()
    size = sum(value.nbytes for value in state.values())

    def sha() -> str:
        digest = hashlib.sha256()
        for _, value in sorted(state.items()):
            digest.update(memoryview(value.flatten().view(torch.uint8).cpu().numpy()))
        return digest.hexdigest()

    found = compare(sha, lambda: fingerprint_of(hf), seconds=seconds, least=5)
    speeds = [size / 1e9 / min(each) for each in (found.base, found.ours)]
    note = f"{size / 1e6:.0f} MB: SHA-256 {speeds[0]:.2f} GB/s, fingerprint {speeds[1]:.2f} GB/s"
    yield timed("fingerprint", "gpt2, one layer", "", found, TARGETS["fingerprint"], note)
    version = version_of(hf)
    kept = recalled.Loaded(version, folder / "kept")
    recalled.fingerprint(hf, version, kept)
    found = compare(
        lambda: fingerprint_of(hf), lambda: recalled.fingerprint(hf, version, kept), seconds=seconds, least=5
    )
    yield timed("kept fingerprint", "gpt2, one layer", "", found, TARGETS["kept"], "the left column computes it")


def _threads(device: str, seconds: float) -> Row:
    model = pb.load(twin("gpt2", n_embd=256, n_head=4, n_layer=4).to(device))
    ids = prompts(4, 32, model.vocab_size, device)

    def ours(n: int) -> None:
        for _ in range(n):
            pb.run(model, ids)

    def plain(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                model.hf(input_ids=ids, use_cache=False)

    def two(runs: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=runs, args=(RUNS // 2,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = compare(lambda: ours(RUNS), lambda: two(ours), seconds=seconds, least=5)
    ceiling = compare(lambda: plain(RUNS), lambda: two(plain), seconds=seconds, least=5)
    note = (
        f"throughput of two threads is {1 / found.best:.2f} that of one; of plain Hugging Face's own runs {1 / ceiling.best:.2f}; "
        f"{torch.get_num_threads()} torch thread each"
    )
    return timed("two threads", "gpt2, 4 layers of 256", f"{RUNS} runs of 4 x 32", found, TARGETS["threads"], note)
