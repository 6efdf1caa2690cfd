"""Turn: make a Knob of parts. Every function returns a Knob, which is data until it is used.

scale   multiply what parts write
"""

from patchbay.turn.scale import scale

__all__ = ["scale"]
