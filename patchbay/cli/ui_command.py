"""`patchbay ui`: the page, served on this machine."""

from __future__ import annotations

import click

from patchbay.cli import complete
from patchbay.late import late


@click.command("ui")
@click.argument("model", required=False, shell_complete=complete.models)
@click.option("--results", default="results", show_default=True, metavar="FOLDER", help="Where Results are read and saved; made where there is none.")  # fmt: skip
@click.option("--dictionary", "dictionaries", multiple=True, metavar="FOLDER", help="A sparse dictionary of the model, for its features; may be given again.")  # fmt: skip
@click.option(
    "--texts",
    metavar="FILE",
    help="Texts, one a line, that each --dictionary has to rebuild: without, the page says that they are not proved.",
)
@click.option("--store", metavar="FILE", help="The store of papers (default: this user's).")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on; without, a free one.")
@click.option("--no-browser", is_flag=True, help="Print the address, and open nothing.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--unsafe-listen", is_flag=True, help="Let --host be an address that other machines reach: whoever has the start address can run the model and read the results, unencrypted.")  # fmt: skip
def ui(model: str | None, results: str, dictionaries: tuple[str, ...], texts: str | None, store: str | None, port: int, no_browser: bool, host: str, unsafe_listen: bool) -> None:  # fmt: skip
    """The page: papers, results of a folder, and MODEL to look at, to run methods on and to turn.

    The address that is printed works once, in one browser; the page is then let in by a cookie. Without MODEL, results can be read.
    """
    late("ui")(
        model, results, port=port, listen=host, unsafe=unsafe_listen, browser=not no_browser, dictionaries=dictionaries, store=store, texts=texts,
        say=click.echo,
    )  # fmt: skip
