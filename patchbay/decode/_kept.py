"""A draft's kept vocabulary: the tokens that it may propose, by how often they come, and the file of them that other programs read.

The file is safetensors with `d2t`: for the i-th kept token its id minus i, as EAGLE-3 heads are stored; i are ids in rising order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from patchbay.files import write_file
from patchbay.model.model import Model
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

NAME = "d2t"


def kept(source: Any, n: int, *, always: Sequence[int] = (), path: str | Path | None = None) -> list[int]:
    """The `n` tokens that come most often in `source`, the Results of a decoder or lists of ids, as rising ids; fewer where fewer come.

    Texts that the target itself wrote are the best source, then the draft's, then other text. `always`: tokens that are kept however
    rare, above all those that end a text, since a draft that cannot end runs on. `path`: where the map is written.
    """
    counts: Counter[int] = Counter()
    for one in source if isinstance(source, list | tuple) else [source]:
        held = one["tokens"].flatten().tolist() if isinstance(one, Result) else one
        counts.update(int(token) for token in held if token >= 0)
    rest = sorted((token for token in counts if token not in always), key=lambda token: (-counts[token], token))
    if n < max(1, len(set(always))):
        raise PatchbayError(f"n={n}: one or more, and room for the {len(set(always))} tokens that are always kept")
    found = sorted({*always, *rest[: n - len(set(always))]})
    if path is not None:
        offsets = torch.tensor(found) - torch.arange(len(found))
        write_file(Path(path), save({NAME: offsets}))
    return found


def read_kept(given: Sequence[int] | str | None, model: Model) -> list[int] | None:
    """Kept ids as given, or from a file of them; refuses what is no set of tokens."""
    if given is None:
        return None
    if isinstance(given, str):
        path = Path(given).expanduser()
        if not path.is_file():
            raise PatchbayError(f"kept: no file {path}; pb.decode.speculative.kept(results, n, path=...) writes one")
        held = load_file(path)
        if NAME not in held:
            raise PatchbayError(f"kept: {path} holds {', '.join(sorted(held))}, and no {NAME}")
        given = (held[NAME] + torch.arange(len(held[NAME]))).tolist()
    found = sorted({int(token) for token in given})
    bad = next((token for token in found if not 0 <= token < model.vocab_size), None)
    if bad is not None or not found:
        raise PatchbayError(
            f"kept: {bad} is no token, the vocabulary is 0..{model.vocab_size - 1}"
            if found
            else "kept: no token is kept"
        )
    return found
