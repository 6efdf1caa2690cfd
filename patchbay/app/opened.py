"""`patchbay ui`: the page's server, on this machine alone unless it was told otherwise by a flag that says what it does."""

from __future__ import annotations

import contextlib
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from patchbay.app.folder import Results
from patchbay.errors import PatchbayError


def serve(
    model: str | None,
    folder: str | Path,
    *,
    port: int = 0,
    listen: str = "127.0.0.1",
    unsafe: bool = False,
    browser: bool = True,
    dictionaries: Sequence[str] = (),
    store: str | None = None,
    texts: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted. `port` 0 takes a free one; `dictionaries`: folders of sparse dictionaries of the model.
    `texts`: a file of texts, one a line, on which they have to be proved. `store`: the store of papers, this user's without. `say` is told the start address, which works once."""
    try:
        from patchbay.app.feed import Papers
        from patchbay.app.pages import application
        from patchbay.app.runs import Runs
        from patchbay.serve.guard import Guard, Keys
        from patchbay.serve.listen import address, bound, server
    except ModuleNotFoundError as error:
        raise PatchbayError(f"the page needs {error.name}: pip install 'patchbay-lm[ui]'") from error
    if dictionaries and model is None:
        raise PatchbayError("a dictionary is of a model: patchbay ui MODEL --dictionary FOLDER")
    if texts is not None and not (dictionaries and Path(texts).is_file()):
        raise PatchbayError(
            f"texts prove dictionaries: a file with one text a line, beside --dictionary FOLDER; got {texts!r}"
        )
    results, keys = _folder(folder), Keys()
    with bound(listen, port, unsafe=unsafe) as listening:
        runs = Runs(_named(model), results, [str(_named(folder)) for folder in dictionaries], _named(texts))
        hosts = (listen, socket.gethostname()) if unsafe else ()
        start = address(listening, keys=keys)
        say(f"results: {results.folder}")
        say(f"open {start}")
        if browser:
            with contextlib.suppress(webbrowser.Error):
                webbrowser.open(start)
        server(Guard(application(results, runs, Papers(store)), keys, hosts=hosts), drain=runs.leave).run(
            sockets=[listening]
        )


def _folder(folder: str | Path) -> Results:
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise PatchbayError(f"{path} is a file; results lie in a folder")
    path.mkdir(parents=True, exist_ok=True)
    return Results(path)


def _named(model: str | None) -> str | None:
    """A local folder by its whole path, since the worker stands elsewhere."""
    return str(Path(model).resolve()) if model is not None and Path(model).exists() else model
