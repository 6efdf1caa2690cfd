"""Measure: what a model does, what a knob does, and what else it does. Every function returns a Result.

A meter reads one published quantity with its interval and null, on a Task, a list, or a file of one's own; the same call before and after a
knob is a side-effect reading.

answer_choices     how often the likeliest choice is right, and how much probability the choices have
dose_response      answers, and harm to unrelated text, at each strength of a knob
minimal_pairs      how often the good sentence of a pair is likelier than the bad one, beside what length gives
text_loss          bits per byte of texts
"""

from patchbay.measure.answer_choices import answer_choices
from patchbay.measure.dose_response import dose_response
from patchbay.measure.minimal_pairs import minimal_pairs
from patchbay.measure.text_loss import text_loss

__all__ = [
    "answer_choices",
    "dose_response",
    "minimal_pairs",
    "text_loss",
]
