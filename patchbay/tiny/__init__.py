"""Built-in models: planted ones whose truth is known, random twins of every family, and small trained ones in the wheel.

`pb.load("tiny")`, `"tiny-wide"`, `"tiny-llama"` and `"tiny-moe"` load the trained ones; `planted` and `twins` build models in memory.
"""

from patchbay.model.source import built_in_names as names
from patchbay.tiny import planted, twins

__all__ = ["names", "planted", "twins"]
