"""Turn: make a Knob of parts. Every function returns a Knob, which is data until it is used; `set_prompt` turns the prompt.

block          cut attention from some tokens to others
channel        multiply or set one component of what a head writes
clamp          hold a neuron, a coordinate or a direction at a value
context_knob   find the direction that decides between context and prior knowledge, and turn it
cut            a smaller model without some heads and neurons, equal to zeroing them
neurofeedback  what a model reports and controls of an axis from examples
persona_vector add the mean state of answers that have a trait
project        take a subspace out of a signal, or keep only that
refusal_direction  let a model answer what it refuses: the direction of refusal, chosen and taken out
remove_direction  let no part write a direction: abliteration
rewrite        give facts another answer in one down projection: ROME, MEMIT
route          forbid, boost or force experts
scale          multiply what parts write, or the values that heads read
set_prompt     answer a prompt whose options have no order
steer          add a direction that contrast pairs differ by
"""

from patchbay.turn.block import block
from patchbay.turn.channel import channel
from patchbay.turn.clamp import clamp
from patchbay.turn.context_knob import context_knob
from patchbay.turn.cut import cut
from patchbay.turn.neurofeedback import neurofeedback
from patchbay.turn.persona_vector import persona_vector
from patchbay.turn.project import project
from patchbay.turn.refusal_direction import refusal_direction
from patchbay.turn.remove_direction import remove_direction
from patchbay.turn.rewrite import rewrite
from patchbay.turn.route import route
from patchbay.turn.scale import scale
from patchbay.turn.set_prompt import set_prompt
from patchbay.turn.steer import steer

__all__ = [
    "block",
    "channel",
    "clamp",
    "context_knob",
    "cut",
    "neurofeedback",
    "persona_vector",
    "project",
    "refusal_direction",
    "remove_direction",
    "rewrite",
    "route",
    "scale",
    "set_prompt",
    "steer",
]
