"""Tasks of one's own: texts and chats, with or without answers, as a task in a model's tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError
from patchbay.model.tokens import Chat, as_texts, template_digest, tokenize
from patchbay.tasks.answers import not_spelled, whole_answers
from patchbay.tasks.scoring import Metric

if TYPE_CHECKING:
    from patchbay.model.model import Model


def from_prompts(
    kind: Any,
    model: Model,
    clean: Any,
    right: Any,
    wrong: Any,
    corrupted: Any,
    metric: Metric | None,
    *,
    name: str,
    aligned: bool,
    normalise: str,
) -> Any:
    """What `Task.from_prompts` documents."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PatchbayError("Task.from_prompts needs a tokenizer and this model has none; make a Task of token ids")
    clean, right, wrong, corrupted = (_column(value, what) for value, what in
                                      ((clean, "prompts"), (right, "right"), (wrong, "wrong"), (corrupted, "corrupted")))  # fmt: skip
    clean = as_texts(tokenizer, clean)
    wrongs = [(w,) if isinstance(w, str) else tuple(_column(w, "wrong")) for w in wrong or [()] * len(clean)]
    if right is None and wrong is not None:
        raise PatchbayError("wrong answers are given and no right ones: give right=")
    rights = [None] * len(clean) if right is None else right
    if not len(clean) == len(rights) == len(wrongs):
        raise PatchbayError(
            f"{len(clean)} prompts, {len(rights)} right and {len(wrongs)} wrong answers: one per prompt"
        )
    spelled = [() if r is None else (r, *ws) for r, ws in zip(rights, wrongs, strict=True)]
    asked = [(text, answer) for text, each in zip(clean, spelled, strict=True) for answer in each]
    other = next((answer for _, answer in asked if not isinstance(answer, str)), None)
    if other is not None:
        raise PatchbayError(f"answers are texts, got {other!r} ({type(other).__name__})")
    tried = whole_answers(tokenizer, asked)
    failed = [pair for pair, ids in tried.items() if ids is None]
    if failed:
        raise PatchbayError(not_spelled(tokenizer, failed, len(tried)))
    answers = [[tried[text, a] or () for a in each] for text, each in zip(clean, spelled, strict=True)]
    several = normalise != "none" or any(len(ids) > 1 for each in answers for ids in each)
    usual = "kl" if right is None else "log_probability" if wrong is None else "logit_diff"
    single = right is not None and not several
    task = kind(
        name=name,
        clean=tuple(tokenize(tokenizer, clean)),
        right=tuple(each[0][0] for each in answers) if single else (),
        wrong=tuple(tuple(ids[0] for ids in each[1:]) for each in answers) if single else (),
        corrupted=None if corrupted is None else tuple(tokenize(tokenizer, as_texts(tokenizer, corrupted))),
        metric=metric or usual,
        options=({} if aligned else {"aligned": False}) | _template(tokenizer, clean),
        texts=tuple(clean),
        answers=tuple(map(tuple, answers)) if several else (),
        answer_texts=tuple(spelled) if several else (),
        normalise=normalise,
    )
    task.check(model.vocab_size)
    return task


def _template(tokenizer: Any, texts: Sequence[str]) -> dict[str, str]:
    """The chat template that wrote a task's prompts, by its digest; nothing where none did."""
    if not any(isinstance(text, Chat) for text in texts):
        return {}
    return {"chat_template_sha256": template_digest(tokenizer)}


def _column(values: Any, what: str) -> Any:
    """A list of texts; one text is no list of its letters."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or ((values is not None or what == "prompts") and not isinstance(values, Sequence)):
        raise PatchbayError(f"{what}: a list with one for each prompt is needed, got {values!r:.40}")
    odd = next((value for value in values or () if not isinstance(value, Hashable | Sequence | Mapping)), None)
    if odd is not None:
        raise PatchbayError(f"{what}: texts are needed, got {odd!r:.40}")
    return values
