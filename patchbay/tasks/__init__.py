"""Tasks: prompts with answers, made for a model's own tokenizer. Every function takes (model, n=100, *, seed=0, ...).

arithmetic         12 + 34 =                               the sum of two numbers
binding_counterfactuals  things in boxes, and a twin       what a box holds; twins tell place, key and pointer apart
entity_binding     things in boxes                         what a box holds, or where a thing is
facts_by_intent    a statement, Mary said / Mary knew      answer by the text, or from memory
facts_in_context   a statement against memory              repeat what the text has stated
facts_in_memory    The capital of Poland is                complete a fact from memory
indirect_object    Mary and John, John gave a drink to     the one who was given to
laundry_list       a list, all but one dealt with          name the one that is left
needle_retrieval   a secret in a long text                 say it when asked
repeated_tokens    the same random string twice            what followed the first time (needs no tokenizer)
successor          5, 6, 7,                                the next number, letter, day or month

Prompts differ in length and in where things stand, so that no fixed position gives an answer away, and within a task
they are all different. The same arguments give the same task. For your own data: `Task.from_prompts`,
`Task.from_file`, `Task.from_frame`.
"""

from patchbay.tasks.arithmetic import arithmetic
from patchbay.tasks.binding_counterfactuals import binding_counterfactuals
from patchbay.tasks.entity_binding import entity_binding
from patchbay.tasks.facts import facts_by_intent, facts_in_context, facts_in_memory
from patchbay.tasks.indirect_object import indirect_object
from patchbay.tasks.laundry_list import laundry_list
from patchbay.tasks.needle_retrieval import needle_retrieval
from patchbay.tasks.repeated_tokens import repeated_tokens
from patchbay.tasks.successor import successor

__all__ = [
    "arithmetic",
    "binding_counterfactuals",
    "entity_binding",
    "facts_by_intent",
    "facts_in_context",
    "facts_in_memory",
    "indirect_object",
    "laundry_list",
    "needle_retrieval",
    "repeated_tokens",
    "successor",
]
