"""Commands as a test types them: in this process, through click's runner."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from patchbay.cli import cli


def patchbay(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="patchbay")


def answer(*args: str) -> Any:
    """The one JSON document on stdout of a command that succeeds."""
    done = patchbay(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
