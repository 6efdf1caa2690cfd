"""Measure: what a model does, what a knob does, and what else it does. Every function returns a Result.

A meter reads one published quantity with its interval and null, on a Task, a list, or a file of one's own; the same call before and after a
knob is a side-effect reading, and `side_effects` makes it of any meters at once.

answer_choices       how often the likeliest choice is right, and how much probability the choices have
benchmark_signal     which benchmarks follow the training of a model at all
boolean_functions    functions of bits learned from examples in the prompt, beside known learners
calibration          whether a model is right as often as it is sure
concurrence          whether a question is answered alike in several languages, and for whom
context_compression  answers when only some sentences of the context are kept
cross_task           what examples of one task do for answers to another
dial_response        what each of several knobs does to each of several attributes of what is written
dictionary           how much of a signal, and of what the model does with it, sparse features hold
dose_response        answers, and harm to unrelated text, at each strength of a knob
doubtful_tokens      whether a guess's wrong tokens are those the model was unsure of
evaluation_card      accuracy, calibration, robustness, fairness and more of the same items in one table
expected_rating      words rated by the probability of a scale's numbers, beside people's norms
function_descriptions  how much of black boxes is explained, beside a table of the same queries
graph_planning       whether ways through a graph told in a prompt exist, arrive and are shortest
head_risk            the error of a linear head on states by how many directions it reads
incoherence          how often a question and its reverse are not answered as opposites
judge_network        whether judges that vote are right more often than one
matched_guise        which attributes a model gives to one way of saying a thing rather than another
minimal_pairs        how often the good sentence of a pair is likelier than the bad one, beside what length gives
novel_word           what a word learned from a few sentences gains in other constructions
predictive_geometry  how sure predictions are, and whether states lie as they do
prompt_change        what glosses, diffs or another wording do for answers
routing              what is gained by sending each text to the better of two models
score_convergence    whether a tuned model's scores follow its base's after examples
self_consistency     how alike answers to one question are when it is asked again
side_effects         any meters with and without a knob, against random knobs
style_detection      whether a few texts of an author find their others
survey_answers       what is chosen of a question's answers when every order is asked
task_probability     whether answers are right where the output is likely
text_loss            bits per byte of texts
word_odds            which words stand in texts of one group rather than another
word_types           accuracy on words that two languages share, by type and context
worst_of_k           the highest score that one of k samples is expected to have
"""

from patchbay.measure.answer_choices import answer_choices
from patchbay.measure.benchmark_signal import benchmark_signal
from patchbay.measure.boolean_functions import boolean_functions
from patchbay.measure.calibration import calibration
from patchbay.measure.concurrence import concurrence
from patchbay.measure.context_compression import context_compression
from patchbay.measure.cross_task import cross_task
from patchbay.measure.dial_response import dial_response
from patchbay.measure.dictionary import dictionary
from patchbay.measure.dose_response import dose_response
from patchbay.measure.doubtful_tokens import doubtful_tokens
from patchbay.measure.evaluation_card import evaluation_card
from patchbay.measure.expected_rating import expected_rating
from patchbay.measure.function_descriptions import function_descriptions
from patchbay.measure.graph_planning import graph_planning
from patchbay.measure.head_risk import head_risk
from patchbay.measure.incoherence import incoherence
from patchbay.measure.judge_network import judge_network
from patchbay.measure.matched_guise import matched_guise
from patchbay.measure.minimal_pairs import minimal_pairs
from patchbay.measure.novel_word import novel_word
from patchbay.measure.predictive_geometry import predictive_geometry
from patchbay.measure.prompt_change import prompt_change
from patchbay.measure.routing import routing
from patchbay.measure.score_convergence import score_convergence
from patchbay.measure.self_consistency import self_consistency
from patchbay.measure.side_effects import side_effects
from patchbay.measure.style_detection import style_detection
from patchbay.measure.survey_answers import survey_answers
from patchbay.measure.task_probability import task_probability
from patchbay.measure.text_loss import text_loss
from patchbay.measure.word_odds import word_odds
from patchbay.measure.word_types import word_types
from patchbay.measure.worst_of_k import worst_of_k

__all__ = [
    "answer_choices",
    "benchmark_signal",
    "boolean_functions",
    "calibration",
    "concurrence",
    "context_compression",
    "cross_task",
    "dial_response",
    "dictionary",
    "dose_response",
    "doubtful_tokens",
    "evaluation_card",
    "expected_rating",
    "function_descriptions",
    "graph_planning",
    "head_risk",
    "incoherence",
    "judge_network",
    "matched_guise",
    "minimal_pairs",
    "novel_word",
    "predictive_geometry",
    "prompt_change",
    "routing",
    "score_convergence",
    "self_consistency",
    "side_effects",
    "style_detection",
    "survey_answers",
    "task_probability",
    "text_loss",
    "word_odds",
    "word_types",
    "worst_of_k",
]
