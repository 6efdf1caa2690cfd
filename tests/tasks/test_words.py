"""The tasks ask in the words that the built-in models were trained on."""

from __future__ import annotations

import random
import re

import pytest

from patchbay import tasks
from patchbay.tasks import words


def test_filler_is_whole_sentences_of_the_listed_words():
    assert words.sentences(random.Random(0), 2) == (
        " The forest was bright and warm. Adam looked for the clean egg but found only the table."
    )


def read(pattern, prompt):
    found = re.fullmatch(pattern, prompt)
    assert found, prompt
    return found.groups()


def rendered(name, task, i):
    """The prompt as the training text's own renderer writes it, from the words read off the prompt."""
    prompt = task.texts[i]
    if name == "laundry_list":
        listed, who, past, done = read(r"On the list are (.+?)\. (\w+) has (\w+) (.+?)\. .+ the", prompt)
        chore = [verb[1] for verb in words.CHORES].index(past)
        things = (re.findall(r"the (\w+)", part) for part in (listed, done))
        return words.render_laundry(*things, name=who, chore=chore)
    if name == "indirect_object":
        first, second, place, giver, thing = read(
            r"\w+ (\w+) and (\w+) (?:went to|were at|left) the (\w+), (\w+) \w+ an? (\w+) to", prompt
        )
        return words.render_indirect_object(first, second, giver, place, thing, template=task.labels["template"][i])
    if name == "entity_binding":
        pairs = re.findall(r"The (\w+) is in box (\w)\.", prompt)
        return words.render_binding([a for a, _ in pairs], [b for _, b in pairs], task.labels["asked"][i])
    if name == "facts_in_memory":
        before, land = read(r"(.*?) ?The capital of (\w+) is", prompt)
        return words.render_fact(land, context=before)
    if name == "facts_in_context":
        land, stated, filler = read(r"The capital of (\w+) is (\w+)\.(.*) The capital of \w+ is", prompt)
        return words.render_contradiction(land, stated, stated, filler=filler)
    if name == "arithmetic":
        return words.render_sum(*map(int, read(r"(\d+) \+ (\d+) =", prompt)))
    if name == "successor":
        members = {"numbers": words.NUMBERS, "letters": words.LETTERS, "days": words.DAYS, "months": words.MONTHS}
        labels = {label: values[i] for label, values in task.labels.items()}
        return words.render_successor(members[labels["kind"]], labels["start"], labels["length"])
    before, who, secret, after = read(r"(.+?\.) The secret of (\w+) is (\w+)\.(.*) The secret of \2 is", prompt)
    return words.render_needle(who, secret.split(), before=before, after=after)


NOT_IN_TRAINING = (
    "repeated_tokens",
    "binding_counterfactuals",
    "facts_by_intent",
)  # made of ids; more pairs, in the wording of entity_binding; taught by a lesson
OPTIONS = {"facts_in_context": {"lead": 0}, "needle_retrieval": {"decoy": False, "depth": 0.6}}


@pytest.mark.parametrize("name", [name for name in tasks.__all__ if name not in NOT_IN_TRAINING])
def test_prompts_equal_what_the_training_text_writes(name, plain):
    task = getattr(tasks, name)(plain, 40, **OPTIONS.get(name, {}))
    for i in range(len(task)):
        item = rendered(name, task, i)
        assert (item.prompt, item.answer) == (task.texts[i], plain.tokenizer.decode([task.right[i]]))
