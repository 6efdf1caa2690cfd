"""Releases of torch and transformers: those that the tests have run on, and what is asked of one that they have not.

`make test-versions` runs the core's tests on both ends of these ranges, in environments of their own, and pyproject.toml declares
the same ranges. With a release that is newer than both, loading says so once and proves what the core relies on, whatever the
arguments of their code are called by then: the self-check, and that a token run on a cache knows its position and gives
the logits of the whole run.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers

from patchbay.errors import PatchbayError
from patchbay.jacks.session import Session
from patchbay.model.self_check import relative
from patchbay.signal.port import Port

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

TESTED = {"torch": ("2.13.0", "2.14.1"), "transformers": ("5.23.0", "5.24.0")}  # oldest and newest, both passed
_WARNED: set[tuple[str, ...]] = set()


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch of a version; what follows (`+cpu`, `rc1`, `.dev0`) does not count."""
    plain = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in plain)


def unseen() -> tuple[str, ...]:
    """Installed releases outside the tested ranges, each with its range; a later patch of the newest minor counts as newer."""
    installed = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    return tuple(
        f"{name} {version} (tested: {TESTED[name][0]} to {TESTED[name][1]})"
        for name, version in installed.items()
        if not _numbers(TESTED[name][0]) <= _numbers(version) <= _numbers(TESTED[name][1])
    )


def prove_unseen(model: Model) -> None:
    """Where a release was never tested: warn once in a process, then prove a cached step of this model or raise."""
    found = unseen()
    if not found:
        return
    if found not in _WARNED:
        _WARNED.add(found)
        warnings.warn(
            f"Patchbay was not tested with {', '.join(found)}: each model is proved as it is loaded, which takes two short runs",
            stacklevel=3,
        )
    prove_cached_step(model)


@torch.no_grad()
def prove_cached_step(model: Model) -> None:
    """Continue three tokens by two as `Model.generate` does. Raises PatchbayError unless the session knows where the fourth
    stands, and the logits of the fifth are those of a whole run without cache."""
    n = model.vocab_size
    ids = torch.tensor([[n // 7, n // 3, n // 2]], device=model.device)
    places: list[tuple[int, int]] = []
    training = [module for module in model.hf.modules() if module.training]
    model.hf.eval()
    try:
        with Session(model, [Port("resid_in", 0)]) as session:
            session.on_call(model.hf, lambda *_: places.append((session.here.start, session.here.end)))
            options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
            options |= {"max_new_tokens": 2, "min_new_tokens": 2, "pad_token_id": 0}
            grown: Any = model.hf.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        whole = model.hf(input_ids=grown.sequences[:, :4], use_cache=False).logits[:, -1]
    finally:
        for module in training:
            module.training = True
    off = relative(grown.logits[1].to(whole.device), whole)
    if places[-1][1] != 4 or off > model.check.tolerance:
        raise PatchbayError(
            f"{type(model.hf).__name__}: a fourth token run on the cache of three was taken for positions {places[-1]} and the "
            f"logits after it differ from the whole run's by {off:.1e}: with {', '.join(unseen()) or 'these releases'} edits at "
            "positions would be wrong in generation; install a tested release"
        )
