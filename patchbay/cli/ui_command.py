"""`patchbay ui`: the page, served on this machine."""

from __future__ import annotations

import click

from patchbay.cli import complete
from patchbay.late import late


@click.command("ui")
@click.argument("model", required=False, shell_complete=complete.models)
@click.option("--results", default="results", show_default=True, metavar="FOLDER", help="Where Results are read and saved; made where there is none.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on; without, a free one.")
@click.option("--no-browser", is_flag=True, help="Print the address, and open nothing.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--unsafe-listen", is_flag=True, help="Let --host be an address that other machines reach: whoever has the start address can run the model and read the results, unencrypted.")  # fmt: skip
def ui(model: str | None, results: str, port: int, no_browser: bool, host: str, unsafe_listen: bool) -> None:
    """The page: results of a folder, and MODEL to look at and run methods on.

    The address that is printed works once, in one browser; the page is then let in by a cookie. Without MODEL, results can be read.
    """
    late("ui")(model, results, port=port, listen=host, unsafe=unsafe_listen, browser=not no_browser, say=click.echo)
