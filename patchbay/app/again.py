"""The call that makes a Result again, as a line of Python, from its record alone.

A record that does not hold enough (a model lent as an object, prompts of one's own, an option that was a Result or a task) gives the
line that replays the saved Result, which says what it lacks. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PLAIN = (bool, int, float, str, type(None))
LONG = 400  # letters of a line that is still one to copy


def python_call(provenance: Mapping[str, Any], folder: str = "FOLDER") -> str:
    """`pb.find.induction_heads(model, pb.tasks.repeated_tokens(model, n=8))` with what loads the model, or the replay of `folder`."""
    replayed = f"import patchbay as pb\n\npb.replay(pb.load_result({folder!r}))"
    method, model = str(provenance.get("method") or ""), provenance.get("model") or {}
    options, source = provenance.get("options"), model.get("source")
    if not re.fullmatch(r"[a-z]+\.[a-z][a-z0-9_]*", method):
        return ""
    if not isinstance(options, Mapping) or not source or set(model) & {"edits", "adapters"}:
        return replayed
    task = _task(provenance.get("task"))
    if task is None or not all(_plain(value) for value in options.values()):
        return replayed
    given = ["model", *([task] if task else [])]
    given += [f"{key}={value!r}" for key, value in options.items() if value is not None]
    name = method.removeprefix("stories.")
    line = f"pb.{name}({', '.join(given)})"
    return f"import patchbay as pb\n\nmodel = pb.load({source!r})\n{line}" if len(line) <= LONG else replayed


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN)


def _task(record: Any) -> str | None:
    """A task made by its own function or prompts as they were; "" for none, None where it cannot be written down."""
    if record is None:
        return ""
    if isinstance(record, Mapping) and "prompts" in record and _plain(record["prompts"]):
        return repr(record["prompts"])
    return (
        None  # a task may have been sliced, mapped or scored otherwise since it was made: the record holds its prompts
    )
