"""One Result or knob as a file of HTML that holds everything: the front end, its style and the numbers. Nothing is fetched.

The file says in its own policy that only the script and the style in it may run, by their digests; the numbers are data, in which no mark-up
can end the script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from pathlib import Path
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.files import write_file

STATIC = Path(__file__).parent / "static"
INLINE = 1 << 21  # values of an array that go into a file


@cache
def static(name: str) -> str:
    """The text of a built file of the front end."""
    return (STATIC / name).read_text(encoding="utf-8")


def saved_page(returned: Any, *, name: str = "") -> str:
    """The whole document."""
    from patchbay.app.document import document

    data = json.dumps(document(returned, name=name, inline=INLINE), ensure_ascii=False, allow_nan=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    script, style = static("patchbay.js").replace("</script", "<\\/script"), static("patchbay.css")
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    title = html.escape(str(returned.provenance.get("method") or name or "Result"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title} · Patchbay</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{style}</style>\n</head>\n<body class="pb">\n<div id="patchbay-page"></div>\n'
        f'<script type="application/json" id="patchbay-data">{data}</script>\n<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def save_html(returned: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the document to a new file, whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise PatchbayError(f"cannot write a page to {path.name!r}: the suffix is .html")
    if path.exists() and not overwrite:
        raise PatchbayError(f"{path} is already there; overwrite=True replaces it")
    return write_file(path, saved_page(returned, name=path.stem).encode())


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
