"""Facts in memory, in context, by intent: what a model knows, what it says when a text contradicts it, and when told which.

`The capital of Poland is` -> ` Warsaw`                                               (facts_in_memory)
`The capital of Poland is Lima. ... The capital of Poland is` -> ` Lima`               (facts_in_context)
`The capital of Poland is Lima. Mary knew. The capital of Poland is` -> ` Warsaw`      (facts_by_intent)

In memory, the right answer is the table's, the corrupted twin asks for another subject, and the wrong answer is the
twin's. In context, the right answer is the stated one, the wrong answer the memorised one, and in the corrupted twin
the statement is true: it differs in that one word, so any effect of the word is an effect of the contradiction. Random
sentences stand in front of the question, and around the statement, so that nothing stands at a fixed place. The
question is that of Yu, Merullo, Pavlick 2023, "Characterizing Mechanisms for Factual Recall". By intent, a phrase says
which of the two answers is right, and the twin says the other, as in Minder et al. 2024, "Controllable
Context Sensitivity and the Knob Behind It".

Which answer is right under a contradiction is a convention: score measures context over memory, not correctness. A
model that does not know the facts shows nothing about memory: measure facts_in_memory first.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.signal.port import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, single_tokens, spell, tokenizer_of

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task

RELATION = "The capital of {subject} is"
WELL_KNOWN = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Russia": "Moscow",
    "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Poland": "Warsaw", "Hungary": "Budapest", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Syria": "Damascus", "Lebanon": "Beirut", "Afghanistan": "Kabul", "Ukraine": "Kiev", "Cuba": "Havana", "Peru": "Lima",
    "Canada": "Ottawa", "Kenya": "Nairobi", "Libya": "Tripoli", "Scotland": "Edinburgh", "Wales": "Cardiff",
    "Thailand": "Bangkok", "Indonesia": "Jakarta", "Taiwan": "Taipei", "Bulgaria": "Sofia", "Romania": "Bucharest",
    "Serbia": "Belgrade", "Croatia": "Zagreb", "Venezuela": "Caracas", "Qatar": "Doha", "Zimbabwe": "Harare",
}  # fmt: skip
INTENT_PLACES = ("before", "after", "question")
TABLES: dict[str, Mapping[str, str]] = {"invented": words.FACTS, "capitals": WELL_KNOWN}


@by_kind
def facts_in_memory(
    model: Model,
    n: int = 100,
    *,
    table: str | Mapping[str, str] | None = None,
    relation: str = RELATION,
    filler: int = 2,
    seed: int = 0,
) -> Task:
    """Complete a fact from memory, after up to `filler` unrelated sentences.

    `table`: invented (the places that the built-in models know), capitals (real ones), a mapping, or a CSV file whose
    first two columns are subject and answer; without a value, invented where this tokenizer has those words, else
    capitals. Marks: `subject`. Labels: `subject`, `answer`.
    """
    chosen, facts = _facts("facts_in_memory", model, table, relation)
    at_least("filler", filler, 0)
    drafts = _memory_drafts(facts, relation, filler, random.Random(f"facts_in_memory-{seed}"))
    options = {"table": chosen, "relation": relation, "filler": filler}
    return spell("facts_in_memory", model, drafts, n, seed=seed, options=options)


@by_kind
def facts_in_context(
    model: Model,
    n: int = 100,
    *,
    table: str | Mapping[str, str] | None = None,
    relation: str = RELATION,
    filler: int = 2,
    lead: int = 1,
    seed: int = 0,
) -> Task:
    """Repeat what the text states against what is remembered.

    Up to `lead` sentences stand before the statement, up to `filler` between it and the question. `table` and
    `relation` as in facts_in_memory. Marks: `context` (the stated answer), `subject` (in the question),
    `subject_in_context`. Labels: `subject`, `memory`, `stated`.
    """
    chosen, facts = _facts("facts_in_context", model, table, relation)
    at_least("filler", filler, 0)
    at_least("lead", lead, 0)
    drafts = _context_drafts(facts, relation, filler, lead, random.Random(f"facts_in_context-{seed}"))
    options = {"table": chosen, "relation": relation, "filler": filler, "lead": lead}
    return spell("facts_in_context", model, drafts, n, seed=seed, options=options)


@by_kind
def facts_by_intent(
    model: Model,
    n: int = 100,
    *,
    table: str | Mapping[str, str] | None = None,
    relation: str = RELATION,
    context: str = "{name} said",
    memory: str = "{name} knew",
    place: str = "any",
    filler: int = 2,
    lead: int = 1,
    seed: int = 0,
) -> Task:
    """Answer as the text states where the phrase `context` stands, and as remembered where `memory` does.

    `place`: "before" the statement or "after" it as a sentence, in the "question" behind its subject between commas, or "any" of
    them. `{name}` is a name drawn for the prompt. The wrong answer and the twin are those of the other intent: what
    `turn.context_knob` needs. A model that was not taught the phrases guesses. Marks: `intent` (the words that differ),
    `context`, `subject`, `subject_in_context`. Labels: `intent` (context or memory), `place`, `subject`, `memory`, `stated`.
    """
    chosen, facts = _facts("facts_by_intent", model, table, relation)
    at_least("filler", filler, 0)
    at_least("lead", lead, 0)
    if place not in (*INTENT_PLACES, "any"):
        raise PatchbayError(f"asked for place={place!r}; possible: {', '.join((*INTENT_PLACES, 'any'))}")
    if not context.strip() or not memory.strip() or context == memory:
        raise PatchbayError(f"context={context!r}, memory={memory!r}: two different phrases that say what to answer by")
    phrases, places = {"context": context, "memory": memory}, INTENT_PLACES if place == "any" else (place,)
    drafts = _intent_drafts(facts, relation, phrases, places, filler, lead, random.Random(f"facts_by_intent-{seed}"))
    options = {"table": chosen, "relation": relation, **phrases, "place": place, "filler": filler, "lead": lead}
    return spell("facts_by_intent", model, drafts, n, seed=seed, options=options)


def _memory_drafts(facts: Mapping[str, str], relation: str, filler: int, rng: random.Random) -> Iterator[Draft]:
    while True:
        subject, other = rng.sample(list(facts), 2)
        if facts[subject] == facts[other]:
            continue
        before = words.sentences(rng, rng.randint(0, filler))[1:]
        before += " " * bool(before)
        prompt = before + relation.replace("{subject}", subject)
        at = len(before) + relation.index("{subject}")
        yield Draft(
            prompt,
            f" {facts[subject]}",
            (f" {facts[other]}",),
            before + relation.replace("{subject}", other),
            marks={"subject": [(at, at + len(subject))]},
            labels={"subject": subject, "answer": facts[subject]},
        )


def _context_drafts(
    facts: Mapping[str, str], relation: str, filler: int, lead: int, rng: random.Random
) -> Iterator[Draft]:
    while True:
        subject, other = rng.sample(list(facts), 2)
        memory, stated = facts[subject], facts[other]
        if memory == stated:
            continue
        before = words.sentences(rng, rng.randint(0, lead))[1:]
        before += " " * bool(before)
        between = words.sentences(rng, rng.randint(0, filler))
        question = relation.replace("{subject}", subject)
        texts = [f"{before}{question} {answer}.{between} {question}" for answer in (stated, memory)]
        starts = {"context": len(before) + len(question) + 1}
        starts["subject"] = len(texts[0]) - len(question) + relation.index("{subject}")
        starts["subject_in_context"] = len(before) + relation.index("{subject}")
        yield Draft(
            texts[0],
            f" {stated}",
            (f" {memory}",),
            texts[1],
            marks={
                mark: [(start, start + len(stated if mark == "context" else subject))] for mark, start in starts.items()
            },
            labels={"subject": subject, "memory": memory, "stated": stated},
        )


def _intent_drafts(
    facts: Mapping[str, str],
    relation: str,
    phrases: Mapping[str, str],
    places: Sequence[str],
    filler: int,
    lead: int,
    rng: random.Random,
) -> Iterator[Draft]:
    """Drafts of facts_in_context with the phrase put in; what stands behind it moves."""
    intents = list(phrases)
    for draft in _context_drafts(facts, relation, filler, lead, rng):
        intent, place, name = rng.choice(intents), rng.choice(places), rng.choice(words.NAMES)
        said = {kind: phrase.replace("{name}", name) for kind, phrase in phrases.items()}
        subject, end = draft.marks["subject"][0]
        start = subject - relation.index("{subject}")
        cut, form = {"before": (0, "{}. "), "after": (start, "{}. "), "question": (end, ", {},")}[place]
        texts = {kind: draft.prompt[:cut] + form.format(said[kind]) + draft.prompt[cut:] for kind in intents}
        moved = len(texts[intent]) - len(draft.prompt)
        marks = {
            mark: [(a + moved, b + moved) if a >= cut else (a, b) for a, b in group]
            for mark, group in draft.marks.items()
        }
        other = intents[1 - intents.index(intent)]
        first = cut + form.index("{")
        marks["intent"] = [(first + a, first + b) for a, b in _apart(said[intent], said[other])]
        answers = {"context": draft.answer, "memory": draft.wrong[0]}
        labels = {"intent": intent, "place": place, **draft.labels}
        yield Draft(texts[intent], answers[intent], (answers[other],), texts[other], marks, labels)


def _apart(one: str, two: str) -> list[tuple[int, int]]:
    """Spans of the words of `one` from the first to the last in which it differs from `two`."""
    spans, other = ([found.span() for found in re.finditer(r"\w+|[^\w\s]", phrase)] for phrase in (one, two))
    mine, theirs = [one[a:b] for a, b in spans], [two[a:b] for a, b in other]
    shortest = min(len(mine), len(theirs))
    front = next((i for i in range(shortest) if mine[i] != theirs[i]), shortest)
    back = next((i for i in range(shortest - front) if mine[-1 - i] != theirs[-1 - i]), shortest - front)
    return spans[front : len(spans) - back]


def _facts(task: str, model: Model, table: str | Mapping[str, str] | None, relation: str) -> tuple[str, dict[str, str]]:
    """The table's name and its facts whose answers are single tokens."""
    tokenizer = tokenizer_of(model, task)
    if relation.count("{subject}") != 1 or relation.endswith(" "):
        raise PatchbayError(
            f"{task}: a relation holds {{subject}} once and ends in a word, like {RELATION!r}; got {relation!r}"
        )
    if table is None:
        places = [*words.FACTS, *words.FACTS.values()]
        table = "invented" if len(single_tokens(tokenizer, places)) == len(places) else "capitals"
    name, facts = (table, TABLES.get(table) or read_table(table)) if isinstance(table, str) else ("own", table)
    answers = set(choose_words(model, task, "answers", list(facts.values()), 2))
    return name, {subject: answer for subject, answer in facts.items() if answer in answers}


def read_table(path: str | Path) -> dict[str, str]:
    """Subject -> answer from a CSV file with a header: its first two columns, such as country and capital."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        known = ", ".join(TABLES)
        raise PatchbayError(f"no table {str(path)!r}: {error}; possible: {known}, a mapping, or a CSV file") from error
    short = next((i for i, row in enumerate(rows, 1) if len(row) < 2 or not row[0].strip() or not row[1].strip()), None)
    if short is not None or len(rows) < 3:
        found = f"row {short} has no two values" if short else f"{len(rows)} rows"
        raise PatchbayError(f"{path}: a table has a header, then a subject and an answer in every row; found {found}")
    return {row[0].strip(): row[1].strip() for row in rows[1:]}
