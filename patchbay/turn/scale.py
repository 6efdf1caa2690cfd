"""Scale: a knob that multiplies what parts write.

    heads: z x strength (so that what the head adds through W_O is multiplied); neurons: activation x strength;
    experts, attention, MLPs: output x strength; key/value groups: values x strength

At 1 the model is untouched bit for bit, at 0 the parts are silent, below 0 they push the other way. Of a head, scaling z is
the same as scaling its value vectors: its attention stays. Making the knob runs nothing.

Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", where one head's value
vectors, multiplied by one number chosen on a development half, move answers from memory to context.

A knob does what it says, and more: `measure.dose_response` shows the answers and the harm at each strength.
"""

from __future__ import annotations

from patchbay import edit
from patchbay.knob import Knob
from patchbay.method import method
from patchbay.model import Model
from patchbay.port import Part, PatchbayError


@method(paper="yu2023")
def scale(parts: list[Part] | Part, strength: float, *, model: Model | None = None, name: str | None = None) -> Knob:
    """A knob that multiplies what `parts` write by `strength` (1 leaves them as they are).

    `parts`: parts or their text ("L1.H2,L3.H0"), such as `result.top(3)`. With `model` the parts are checked against it
    now and the knob says whose it is; without, when it is first used.
    """
    listed = list(dict.fromkeys([parts] if isinstance(parts, Part) else parts))
    if not listed:
        raise PatchbayError("no parts to scale were given")
    ports = [part.port() for part in listed]
    for port in ports:
        if model is not None:
            model.require(port)
    shown = "+".join(map(str, listed[:4])) + (f"+{len(listed) - 4} more" if len(listed) > 4 else "")
    return Knob(name or f"scale {shown}", [edit.scale(port, 1.0) for port in ports], strength)
