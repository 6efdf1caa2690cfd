"""Settings written as text, `NAME:key=value,key=value`; the keys are the fields of a class."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from patchbay.signal.port import PatchbayError

Made = TypeVar("Made")


def made(what: str, text: str, form: type[Made]) -> Made:
    """`form` with the settings of a text, those after its first colon, each as the type of its default."""
    known: dict[str, Any] = {field.name: type(field.default) for field in fields(form)}  # type: ignore[arg-type]
    name, _, rest = text.partition(":")
    given = {}
    for piece in filter(None, rest.split(",")):
        key, _, value = piece.partition("=")
        key = key.strip()
        if key not in known:
            has = ", ".join(known) or "none"
            raise PatchbayError(f"{what} {name.strip()} has no setting {key!r}; its settings are {has}")
        if key in given:
            raise PatchbayError(f"{what} {name.strip()}: {key} is given twice, in {text!r}")
        try:
            given[key] = known[key](value.strip())
        except ValueError:
            raise PatchbayError(
                f"{what} {name.strip()}: {piece!r}; {key} is written as {known[key].__name__}"
            ) from None
    found = form(**given)
    found.check()  # type: ignore[attr-defined]
    return found
