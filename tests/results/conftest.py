"""A method of the package that is none: a fixture of several files here."""

from tests.fakes import installed  # noqa: F401
