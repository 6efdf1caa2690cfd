import re

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import facts_by_intent, facts_in_context, facts_in_memory
from patchbay.tasks.facts import WELL_KNOWN, read_table
from patchbay.tasks.words import FACTS

QUESTION = re.compile(r"The capital of (\w+) is$")
STATEMENT = re.compile(r"The capital of (\w+) is (\w+)\.")


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


def table_of(model):
    return WELL_KNOWN if "Ġ" in "".join(model.tokenizer.get_vocab()) else FACTS


def test_default_table_is_the_one_whose_words_the_tokenizer_has(plain, gpt2):
    assert facts_in_memory(plain, 5).options["table"] == "invented"
    assert facts_in_memory(gpt2, 5).options["table"] == "capitals"


def test_memory_right_is_the_tables_answer_and_the_twin_asks_another(model):
    table, task = table_of(model), facts_in_memory(model, 60)
    for i in range(len(task)):
        clean, twin = said(model, task.clean[i]), said(model, task.corrupted[i])
        subject, other = (QUESTION.search(text).group(1) for text in (clean, twin))
        assert not STATEMENT.search(clean)
        assert said(model, task.right[i : i + 1]) == f" {table[subject]}"
        assert said(model, task.wrong[i]) == f" {table[other]}"
        assert clean.removesuffix(f"{subject} is") == twin.removesuffix(f"{other} is")
        assert said(model, [task.clean[i][at] for at in task.marks["subject"][i]]) == f" {subject}"


def test_context_right_is_stated_wrong_is_known_and_the_twin_states_the_truth(model):
    table, task = table_of(model), facts_in_context(model, 60)
    for i in range(len(task)):
        clean = said(model, task.clean[i])
        ((subject, stated),) = STATEMENT.findall(clean)
        assert subject == QUESTION.search(clean).group(1) == task.labels["subject"][i]
        assert stated != table[subject]
        assert said(model, task.right[i : i + 1]) == f" {stated}"
        assert said(model, task.wrong[i]) == f" {table[subject]}"
        differ = [
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        ]
        assert tuple(differ) == task.marks["context"][i]
        assert STATEMENT.findall(said(model, task.corrupted[i])) == [(subject, table[subject])]
        for mark in ("subject", "subject_in_context"):
            assert said(model, [task.clean[i][at] for at in task.marks[mark][i]]) == f" {subject}"
        assert task.marks["subject_in_context"][i] < task.marks["context"][i] < task.marks["subject"][i]


def test_filler_and_lead_are_what_was_asked(plain):
    bare = facts_in_context(plain, 30, filler=0, lead=0)
    assert all(text.count(".") == 1 and text.startswith("The capital") for text in bare.texts)
    more = facts_in_context(plain, 80, filler=3, lead=2)
    assert {text.count(".") for text in more.texts} == {1, 2, 3, 4, 5, 6}
    assert {text.count(".") for text in facts_in_memory(plain, 60, filler=2).texts} == {0, 1, 2}


def test_more_prompts_than_facts_says_how_many_there_are(plain):
    assert len(facts_in_memory(plain, 80, filler=0)) == 80
    with pytest.raises(
        PatchbayError, match=r"asked for 81 different prompts, found 80 with .*filler=0; possible: n up to 80"
    ):
        facts_in_memory(plain, 81, filler=0)


def test_own_table_and_relation(gpt2):
    own = {"the sky": "blue", "the grass": "green", "the snow": "white", "the blood": "red", "the xyzzyq": "plughxyz"}
    relation = "The colour of {subject} is"
    task = facts_in_context(gpt2, 12, table=own, relation=relation)
    assert task.options["table"] == "own"
    assert set(task.labels["subject"]) == set(own) - {"the xyzzyq"}
    for i, subject in enumerate(task.labels["subject"]):
        assert task.texts[i].endswith(relation.format(subject=subject))
        assert said(gpt2, task.wrong[i]) == f" {own[subject]}"


def test_answers_that_are_no_single_tokens_are_counted(gpt2):
    own = {"a": "blue", "b": "Ouagadougou", "c": "Antananarivo"}
    with pytest.raises(PatchbayError, match=r"asked for 2 answers, found 1 .* of 3 tried \('Ouagadougou' is 'ĠOu"):
        facts_in_memory(gpt2, table=own)


@pytest.mark.parametrize("relation", ["The capital is", "The capital of {subject} is ", "{subject} and {subject} are"])
def test_relation_without_one_subject(plain, relation):
    with pytest.raises(PatchbayError, match=r"holds \{subject\} once"):
        facts_in_memory(plain, relation=relation)


def test_table_from_a_file(tmp_path, gpt2):
    path = tmp_path / "capitals.csv"
    path.write_text('country,capital,type\nPoland,Warsaw,a\n"France","Paris",b\nPeru,Lima,c\n\n', encoding="utf-8")
    assert read_table(path) == {"Poland": "Warsaw", "France": "Paris", "Peru": "Lima"}
    task = facts_in_memory(gpt2, 3, table=str(path), filler=0)
    assert set(task.labels["answer"]) == {"Warsaw", "Paris", "Lima"}


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "possible: invented, capitals"), ("a,b\nc\n", "row 2"), ("a,b\nc,d\n", "2 rows"), ("", "0 rows")],
)
def test_bad_table_files(tmp_path, plain, text, found):
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PatchbayError, match=found):
        facts_in_memory(plain, table=str(path))


@pytest.mark.parametrize("place", ["before", "after", "question"])
def test_by_intent_the_phrase_decides_and_the_twin_says_the_other(model, place):
    table, task = table_of(model), facts_by_intent(model, 40, place=place)
    for i in range(len(task)):
        clean = said(model, task.clean[i])
        subject, stated, intent = (task.labels[name][i] for name in ("subject", "stated", "intent"))
        word, other = ("said", "knew") if intent == "context" else ("knew", "said")
        phrase = rf", \w+ {word}, is$" if place == "question" else rf"(^| )[A-Z]\w+ {word}\. ?"
        at = re.search(phrase, clean)
        assert at
        assert (at.start() < clean.index(stated)) == (place == "before")
        answers = {"context": f" {stated}", "memory": f" {table[subject]}"}
        assert said(model, task.right[i : i + 1]) == answers[intent]
        assert {said(model, task.right[i : i + 1]), said(model, task.wrong[i])} == set(answers.values())
        differ = [j for j, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1]
        assert tuple(differ) == task.marks["intent"][i]
        assert said(model, [task.clean[i][j] for j in differ]).strip() == word
        assert said(model, [task.corrupted[i][j] for j in differ]).strip() == other
        assert said(model, [task.clean[i][j] for j in task.marks["subject"][i]]) == f" {subject}"
        assert said(model, [task.clean[i][j] for j in task.marks["context"][i]]) == f" {stated}"
    assert set(task.labels["intent"]) == {"context", "memory"}
    assert set(task.labels["place"]) == {place}


def test_by_intent_takes_phrases_of_ones_own_and_refuses_two_that_are_one(plain):
    task = facts_by_intent(plain, 5, context="They said that", memory="They knew that", place="after")
    assert all("They said that." in text or "They knew that." in text for text in task.texts)
    assert all(len(positions) == 1 for positions in task.marks["intent"])
    with pytest.raises(PatchbayError, match="two different phrases"):
        facts_by_intent(plain, 5, context="They said", memory="They said")
    with pytest.raises(PatchbayError, match="possible: before, after, question, any"):
        facts_by_intent(plain, 5, place="nowhere")
