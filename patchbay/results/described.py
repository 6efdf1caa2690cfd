"""What a method's two docstrings say, in parts: the claim, and a word on every option. Parsed here alone.

The file's docstring opens with the claim, formula, paper and caveat; the function's with what it returns. An option's word is a
sentence of the function's docstring that starts with its name:

    `positions`: how many of the last positions are read.        `keys`, `queries`: as in 0, [1, 2] or "last".

up to the full stop. Options that mean the same everywhere have theirs in `COMMON`, unless the docstring says more. `help()`, the
command line and the pages of methods show these same words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

COMMON = {
    "batch_size": "prompts that are run at a time; it changes time and memory, not what is measured.",
    "seed": "of random draws and splits; the same seed gives the same numbers.",
    "max_new_tokens": "how many tokens are added, or fewer where a text ends.",
    "ends": "tokens that end a text; without, those of the model's generation config; an empty list for none.",
    "name": "what the knob is called; without, it is called after what it does.",
    "model": "the model, as `load` returns it.",
    "task": "prompts with their answers, as `patchbay.tasks` makes them or `Task.from_prompts`.",
    "prompts": "texts, lists of token ids, or a task.",
    "items": "a Task, a list of mappings, a file with named fields, or the name of a built-in task.",
}
_WORD = re.compile(r"(?:(?<=[.;:] )|^)((?:`\w+`(?:, | and )?)+): ", re.MULTILINE)
_END = re.compile(r"\.(?= [A-Z`(]|$)")


def words(doc: str, options: Sequence[str]) -> dict[str, str]:
    """option -> its word in a function's docstring, or what it means everywhere; options without one are left out."""
    found = {name: COMMON[name] for name in options if name in COMMON}
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        line = " ".join(paragraph.split())
        starts = list(_WORD.finditer(line))
        for i, start in enumerate(starts):
            rest = line[start.end() : starts[i + 1].start() if i + 1 < len(starts) else len(line)].strip()
            end = _END.search(rest)
            for name in re.findall(r"`(\w+)`", start[1]):
                found[name] = rest[: end.end()] if end else rest
    return {name: found[name] for name in options if name in found}


def whole(module_doc: str, doc: str, options: Sequence[str]) -> str:
    """The text of `help()`: what is returned, every option, and the file's claim with formula, paper and caveat."""
    said = inspect.cleandoc(doc)
    own = words(doc, options)
    missing = [f"`{name}`: {text}" for name, text in own.items() if f"`{name}`: {text}" not in " ".join(said.split())]
    missing = [line for line in missing if not _grouped(line, said)]
    return "\n\n".join(filter(None, [said, "\n".join(missing), inspect.cleandoc(module_doc)])) + "\n"


def _grouped(line: str, said: str) -> bool:
    """Whether the docstring says it of several options at once."""
    return line.partition(": ")[2] in " ".join(said.split())
