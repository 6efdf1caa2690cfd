"""Train: change weights, and only those of chosen parts. Every function returns a Result, and leaves the lent model as it was.

tune_parts  fine-tune the weights of chosen parts, everything else bit for bit as it was
"""

from patchbay.train.tune_parts import tune_parts

__all__ = ["tune_parts"]
