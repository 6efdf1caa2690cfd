"""Find: which parts of a model have to do with something. Every function returns a Result that ranks parts.

direct_logit_attribution   what each head, neuron, expert or layer writes towards the answer
induction_heads            heads that look at what followed this token the last time
logit_lens                 what the stream would answer if the model stopped at each layer
previous_token_heads       heads that look one position back

A rank says where to look. Whether the model uses a part is for `patchbay.prove` to say.
"""

from patchbay.find.direct_logit_attribution import direct_logit_attribution
from patchbay.find.induction_heads import induction_heads
from patchbay.find.logit_lens import logit_lens
from patchbay.find.previous_token_heads import previous_token_heads

__all__ = ["direct_logit_attribution", "induction_heads", "logit_lens", "previous_token_heads"]
