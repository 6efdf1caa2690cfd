"""Measure: what a model does, what a knob does, and what else it does. Every function returns a Result.

A meter reads one published quantity with its interval and null, on a Task, a list, or a file of one's own; the same call before and after a
knob is a side-effect reading, and `side_effects` makes it of any meters at once.

answer_choices       how often the likeliest choice is right, and how much probability the choices have
calibration          whether a model is right as often as it is sure
concurrence          whether a question is answered alike in several languages, and for whom
dial_response        what each of several knobs does to each of several attributes of what is written
dictionary           how much of a signal, and of what the model does with it, sparse features hold
dose_response        answers, and harm to unrelated text, at each strength of a knob
expected_rating      words rated by the probability of a scale's numbers, beside people's norms
head_risk            the error of a linear head on states by how many directions it reads
incoherence          how often a question and its reverse are not answered as opposites
matched_guise        which attributes a model gives to one way of saying a thing rather than another
minimal_pairs        how often the good sentence of a pair is likelier than the bad one, beside what length gives
predictive_geometry  how sure predictions are, and whether states lie as they do
self_consistency     how alike answers to one question are when it is asked again
side_effects         any meters with and without a knob, against random knobs
survey_answers       what is chosen of a question's answers when every order is asked
text_loss            bits per byte of texts
word_odds            which words stand in texts of one group rather than another
worst_of_k           the highest score that one of k samples is expected to have
"""

from patchbay.measure.answer_choices import answer_choices
from patchbay.measure.calibration import calibration
from patchbay.measure.concurrence import concurrence
from patchbay.measure.dial_response import dial_response
from patchbay.measure.dictionary import dictionary
from patchbay.measure.dose_response import dose_response
from patchbay.measure.expected_rating import expected_rating
from patchbay.measure.head_risk import head_risk
from patchbay.measure.incoherence import incoherence
from patchbay.measure.matched_guise import matched_guise
from patchbay.measure.minimal_pairs import minimal_pairs
from patchbay.measure.predictive_geometry import predictive_geometry
from patchbay.measure.self_consistency import self_consistency
from patchbay.measure.side_effects import side_effects
from patchbay.measure.survey_answers import survey_answers
from patchbay.measure.text_loss import text_loss
from patchbay.measure.word_odds import word_odds
from patchbay.measure.worst_of_k import worst_of_k

__all__ = [
    "answer_choices",
    "calibration",
    "concurrence",
    "dial_response",
    "dictionary",
    "dose_response",
    "expected_rating",
    "head_risk",
    "incoherence",
    "matched_guise",
    "minimal_pairs",
    "predictive_geometry",
    "self_consistency",
    "side_effects",
    "survey_answers",
    "text_loss",
    "word_odds",
    "worst_of_k",
]
