"""Claims about text that another network compressed: which of its bits a second network learns to read.

The networks are the lab's own, from weights drawn by the seed, and the model at hand has no part.
"""

from __future__ import annotations

import functools
import math
import random
from typing import TYPE_CHECKING, Any

from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims._grown import nats_by_frequency
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

BITS, ROW, LENGTH = 8, 16, 192  # bits of a token, tokens of a row, characters of a text
TEXTS, HELD = 1000, 100
Rows = list[list[int]]


@claim("lester2024", "made", seeds=TRAINED)
def lester2024(model: Model, seed: int) -> Claim:
    """Confirmed if a network that reads windows of equal information, 8 bits each, saves more on a held-out token, beside what its frequency costs, than one that reads plain arithmetic-coded bits, 8
    to a token, by more than a tenth of a nat; rows, steps and weights are as many. Told beside it: the same windows in another order in every text; and bits per character of the text, also of characters
    and of byte-pair tokens."""
    found = _read(seed)
    saved = {name: float(one["saved"].mean()) for name, one in found.items()}
    bits = {name: one["bits"] for name, one in found.items()}
    text = (
        f"beside what frequencies cost, a network of 70,000 weights saves {saved['windows']:.2f} nats a token on windows of {BITS} bits, {saved['plain']:.2f} on plain coded bits (which cost {found['plain']['nats']:.2f}, even chances "
        f"{math.log(1 << BITS):.2f}), {saved['shuffled']:.2f} on windows in another order; bits per character {bits['windows']:.2f} (windows), {bits['plain']:.2f} (plain), {bits['characters']:.2f} (characters), {bits['pieces']:.2f} "
        "(byte-pair tokens)"
    )
    return Claim(text, *difference(found["windows"]["saved"], found["plain"]["saved"]), 0.1, "nats per token")


@functools.cache
def _read(seed: int) -> dict[str, dict[str, Any]]:
    """Of each way to write a text: `saved` [text] nats a token less than by frequency, `nats` a token, `bits` per character."""
    import torch

    from patchbay.corpus.diachronic import surprisals
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    texts = lab.characters(TEXTS + HELD, seed, LENGTH)
    rows, sizes = written(texts, _compressor(texts[:TEXTS], seed), seed)
    start = lab.small(1 << BITS, width=48, mlp=96)
    found = {}
    for name, some in rows.items():
        data, held = some[:TEXTS], some[TEXTS:]

        def nats(tuned: Model, held: Rows = held) -> Tensor:
            return surprisals(tuned, held).reshape(HELD, ROW - 1)

        own = trained(start, data, nats, seed, {"one": Arm()}, fresh=True, steps=120, batch_size=24)["one"]
        often = nats_by_frequency(torch.tensor(data), held, 1 << BITS)
        characters = sum(sizes[name][TEXTS:])
        found[name] = {
            "saved": (often - own).mean(1),
            "nats": float(own.mean()),
            "bits": float(own.sum()) / math.log(2) / characters,
        }
    return found


def _compressor(texts: Rows, seed: int) -> Model:
    """A network that says the next character; its last token stands before every text."""
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    first = len(lab.ALPHABET)
    start = lab.small(first + 1, width=48, mlp=96, positions=LENGTH + 1)
    found: Any = trained(
        start,
        [[first, *ids] for ids in texts],
        lambda tuned: tuned,  # type: ignore[arg-type, return-value]
        seed,
        {"one": Arm()},
        fresh=True,
        steps=100,
        batch_size=8,
        length=LENGTH + 1,
    )["one"]
    return found  # type: ignore[no-any-return]


def written(texts: Rows, compressor: Model, seed: int) -> tuple[dict[str, Rows], dict[str, list[float]]]:
    """The beginning of each text as ROW tokens of each way, and how many characters all but the first of these tokens hold."""
    from patchbay.corpus.compression import decode_windows, encode_windows
    from patchbay.tiny import lab

    first = len(lab.ALPHABET)
    windows = [some[:ROW] for some in encode_windows(compressor, [[first, *ids] for ids in texts], BITS)]
    held = [len(decode_windows(compressor, [window], BITS, first)) - 1 for window in range(1 << BITS)]
    shuffled = [random.Random(f"windows {seed} {i}").sample(one, ROW) for i, one in enumerate(windows)]
    plain, each = coded(texts, compressor)
    pieces, letters = _pieces(texts)
    rows = {
        "windows": windows,
        "plain": plain,
        "shuffled": shuffled,
        "characters": [ids[:ROW] for ids in texts],
        "pieces": pieces,
    }
    sizes = {
        "windows": [float(sum(held[one] for one in some[1:])) for some in windows],
        "shuffled": [float(sum(held[one] for one in some[1:])) for some in shuffled],
        "plain": each,
        "characters": [ROW - 1.0] * len(texts),
        "pieces": letters,
    }
    return rows, sizes


def coded(texts: Rows, compressor: Model) -> tuple[Rows, list[float]]:
    """Texts as plain arithmetic-coded bits, BITS to a token, and the characters of ROW - 1 tokens where as many are in each. The coder is that of `encode`; many texts are run at once, as nothing is decoded."""
    import torch

    from patchbay.corpus.compression import Encoder, whole_numbers
    from patchbay.tiny import lab

    rows, sizes = [], []
    for at in range(0, len(texts), 50):
        some = [[len(lab.ALPHABET), *ids] for ids in texts[at : at + 50]]
        with torch.no_grad():
            tables = whole_numbers(compressor.hf(input_ids=torch.tensor(some)).logits)  # [text, position, token + 1]
        for ids, table in zip(some, tables.tolist(), strict=True):
            coder, n = Encoder(), 0
            while len(coder.out) < BITS * ROW and n + 1 < len(ids):
                coder.write(table[n][ids[n + 1]], table[n][ids[n + 1] + 1])
                n += 1
            bits = (coder.out + [0] * (BITS * ROW))[: BITS * ROW]
            rows.append([int("".join(map(str, bits[i : i + BITS])), 2) for i in range(0, BITS * ROW, BITS)])
            sizes.append(n * (ROW - 1) / ROW)
    return rows, sizes


def _pieces(texts: Rows) -> tuple[Rows, list[float]]:
    """Texts as byte-pair tokens of a tokenizer that was trained on those that are not held out."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from patchbay.tiny import lab

    said = ["".join(lab.ALPHABET[i] for i in ids) for ids in texts]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+| "), "isolated")
    made.train_from_iterator(said[:TEXTS], trainers.BpeTrainer(vocab_size=1 << BITS, show_progress=False))
    found = [made.encode(one) for one in said]
    sizes = [float(sum(len(one) for one in some.tokens[1:ROW])) for some in found]
    return [some.ids[:ROW] for some in found], sizes
