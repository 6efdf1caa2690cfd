"""Scale: a knob that multiplies what parts write.

    of outputs   heads: z x strength (so that what the head adds through W_O is multiplied); neurons: activation x
                 strength; experts, attention, MLPs: output x strength; key/value groups: values x strength
    of values    heads, key/value groups, attention: value vectors x strength, at the positions that are attended to

At 1 the model is untouched bit for bit, at 0 the parts are silent, below 0 they push the other way. At all positions,
scaling z of a head is the same as scaling its value vectors: its attention stays. At some positions it is not: outputs are
scaled where the head writes, values where it reads from. Heads that share the values of their group have none of their
own: name the group, or scale outputs. An expert's share of the routing stays (see `route`). Making the knob runs nothing.

Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", where one head's value
vectors, multiplied by one number chosen on a development half, move answers from memory to context.

A knob does what it says, and more: `measure.dose_response` shows the answers and the harm at each strength.
"""

from __future__ import annotations

from typing import Literal

from patchbay.edits import edit
from patchbay.errors import one_of
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.turn._places import Place, places

Of = Literal["outputs", "values"]


@method(paper="yu2023")
def scale(
    parts: list[Part] | Part,
    strength: float,
    *,
    of: Of = "outputs",
    positions: Place = None,
    model: Model | None = None,
    name: str | None = None,
) -> Knob:
    """A knob that multiplies what `parts` write by `strength` (1 leaves them as they are).

    `parts`: parts or their text ("L1.H2,L3.H0"), such as `result.top(3)`. `of`: their outputs, or the value vectors that
    heads read. `positions`: as in "last", [1, 2], "2:5"; all without. With `model` the parts are checked against it now and the
    knob says whose it is; without, when it is first used.

    `strength`: what the parts' output is multiplied by; 1 leaves it, 0 takes it away.
    """
    listed = list(dict.fromkeys([parts] if isinstance(parts, Part) else parts))
    if not listed:
        raise PatchbayError("no parts to scale were given")
    one_of("of", of, ("outputs", "values"))
    ports = list(dict.fromkeys(part.port() if of == "outputs" else _values(part, model) for part in listed))
    for port in ports:
        if model is not None:
            model.require(port)
    shown = "+".join(map(str, listed[:4])) + (f"+{len(listed) - 4} more" if len(listed) > 4 else "")
    what = "scale" if of == "outputs" else "scale values of"
    at = places(positions)
    return Knob(name or f"{what} {shown}", [edit.scale(port, 1.0, positions=at) for port in ports], strength)


def _values(part: Part, model: Model | None) -> Port:
    """The port of a part's value vectors."""
    if part.kind in ("group", "attn"):
        return part.port("v")
    if part.kind != "head":
        raise PatchbayError(f"{part} reads no value vectors: of='values' is for heads, key/value groups and attention")
    if model is None:
        raise PatchbayError(f"{part}: which values a query head reads, only the model knows: give model=")
    model.require(part.port("z"))
    layer, index = part.layer or 0, part.index or 0
    n_heads, n_groups = model.n_heads(layer), model.n_groups(layer)
    group = index * n_groups // n_heads
    if n_groups < n_heads:
        sharing = [f"L{layer}.H{i}" for i in range(n_heads) if i * n_groups // n_heads == group]
        raise PatchbayError(
            f"{part} has no values of its own: {', '.join(sharing)} share those of L{layer}.KV{group}; name that group, "
            "or scale outputs, which for one head is the same"
        )
    return Port("attn.v", layer, group)
