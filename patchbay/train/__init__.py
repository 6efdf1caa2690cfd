"""Train: change the weights of chosen parts or of a whole variant, or fit what reads a model. Every function returns a Result, and leaves the lent model as it was.

dictionary       sparse features of a signal, in SAELens's form
response_tuning  train on answers without their questions, and see whether questions are answered
subspace_fusion  keep of what tuning changed the entries under which lost behaviour comes back
tune_parts       fine-tune the weights of chosen parts, everything else bit for bit as it was
tuned_lens       maps of each layer through which the stream says what the model will say
variant          train another way beside a twin trained the plain way, by pairs of seeds
"""

from patchbay.train.dictionary import dictionary
from patchbay.train.response_tuning import response_tuning
from patchbay.train.subspace_fusion import subspace_fusion
from patchbay.train.tune_parts import tune_parts
from patchbay.train.tuned_lens import tuned_lens
from patchbay.train.variant import variant

__all__ = ["dictionary", "response_tuning", "subspace_fusion", "tune_parts", "tuned_lens", "variant"]
