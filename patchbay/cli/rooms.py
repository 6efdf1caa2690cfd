"""One group for each verb: the methods of its folder, of installed packages, and of a file that is named by its path."""

from __future__ import annotations

import click

from patchbay.cli import options
from patchbay.cli.commands import CALLED, Commands, all_command, method_command
from patchbay.cli.signatures import source
from patchbay.results import outside
from patchbay.signal.port import PatchbayError


class Room(Commands):
    """The methods of one folder, of installed packages, and of a file; listed from their text, imported when run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        own, others = options.files(str(self.name)), outside.offers(str(self.name))
        names = [name.replace("_", "-") for name in sorted([*own, *others])]
        return ["all", *names] if self.name == "find" else names

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb, name = str(self.name), cmd_name.replace("-", "_")
        if (verb, name) == ("find", "all"):
            return all_command()
        if name in options.files(verb):
            return method_command(verb, name)
        found = outside.entry(verb, name)
        return None if found is None else method_command(verb, name, found)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if outside.is_path(args[0]):
            found = outside.named(args[0], str(self.name))
            ctx.meta[CALLED] = method_command(found.verb, found.name, found)
        elif args[0].replace("-", "_") in options.files(str(self.name)):  # the packages that are installed need no look
            ctx.meta[CALLED] = self.get_command(ctx, args[0])
        else:
            return super().resolve_command(ctx, args)
        return args[0], ctx.meta[CALLED], args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Methods"):
            listed = options.methods(str(self.name)).values()
            rows = [(one.name.replace("_", "-"), one.doc) for one in listed]
            everything = [("all", "every finder at once, how they agree, and what each role's heads do together")]
            formatter.write_dl((everything if self.name == "find" else []) + rows)
        rows = [(name.replace("_", "-"), _offered(str(self.name), name)) for name in outside.offers(str(self.name))]
        with formatter.section("Methods of installed packages"):
            formatter.write_dl([*rows, ("./FILE.py", "the method of a file, or ./FILE.py:NAME where it has several")])


def _offered(verb: str, name: str) -> str:
    """What a method of an installed package is, in a line, from its text."""
    try:
        found = outside.entry(verb, name)
    except PatchbayError as error:
        return str(error)
    listed = None if found is None else options.listed(source(found.path), name)
    return "" if listed is None else listed.doc
