"""Measure: what a knob does, and what else it does. Every function returns a Result.

dose_response   answers, and harm to unrelated text, at each strength of a knob
"""

from patchbay.measure.dose_response import dose_response

__all__ = ["dose_response"]
