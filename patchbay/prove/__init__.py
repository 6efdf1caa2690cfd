"""Prove: does the model use these parts? Every function intervenes, and compares with matched controls.

ablation              what is lost without the parts, against as many random parts of the same layers
activation_patching   what one run's signals, put into the other run of a pair, bring back or take away
attention_knockout    in which layers the answer needs what some tokens tell others by attention
knockout_curve        what is lost as more and more parts are taken away together, against random ones
path_patching         what a part tells another part, or the logits, by the path between them alone
"""

from patchbay.prove.ablation import ablation
from patchbay.prove.activation_patching import activation_patching
from patchbay.prove.attention_knockout import attention_knockout
from patchbay.prove.knockout_curve import knockout_curve
from patchbay.prove.path_patching import path_patching

__all__ = ["ablation", "activation_patching", "attention_knockout", "knockout_curve", "path_patching"]
