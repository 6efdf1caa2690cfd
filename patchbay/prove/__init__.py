"""Prove: does the model use these parts? Every function intervenes, and compares with matched controls.

ablation   what is lost without the parts, against as many random parts of the same layers
"""

from patchbay.prove.ablation import ablation

__all__ = ["ablation"]
