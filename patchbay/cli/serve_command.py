"""`patchbay serve` and `patchbay mcp`: a model behind an address, and the instrument as an agent's tools."""

from __future__ import annotations

from typing import Any

import click

from patchbay.cli import complete
from patchbay.cli.commands import load_model, model_options
from patchbay.signal.port import PatchbayError


def _needs(extra: str, error: ImportError) -> PatchbayError:
    return PatchbayError(f"{error.name or error} is not installed: pip install 'patchbay-lm[{extra}]'")


def _serve(
    model: str, knobs: str | None, name: str | None, host: str, port: int, unsafe_listen: bool, hosts: tuple[str, ...],
    max_batch_tokens: int, max_rows: int, max_queue: int, max_body: int, log_prompts: bool, replicas: int | None, **given: Any,
) -> None:  # fmt: skip
    """Serve MODEL by OpenAI's protocol, with another knob for every request: completions, chat completions, models.

    A request names knobs in the model's name, tiny+context@2+calm, or in its body, {"patchbay": {"knobs": [{"name": "context",
    "strength": 2}]}}. The address and the token are printed; a token of your own stands in the variable PATCHBAY_TOKEN.
    Ctrl-C lets running requests end, a second one does not. docs/serve.md has the protocol and the bounds.
    """
    try:
        from patchbay.serve.engine import Room
        from patchbay.serve.guard import Limits
        from patchbay.serve.run import Settings, name_of, run
    except ImportError as error:
        raise _needs("serve", error) from error
    settings = Settings(
        name or name_of(model), knobs, host, port, unsafe_listen, hosts,
        Room(max_batch_tokens, max_rows, max_queue), Limits(max_body), log_prompts,
    )  # fmt: skip
    if replicas is not None:
        from patchbay.serve.replicas import run_replicas

        options = {key: given[key] for key in ("device", "trust_remote_code") if given.get(key)}
        run_replicas(model, options, settings, replicas, click.echo)
        return
    run(load_model(model, given), settings, click.echo)


serve = click.Command(
    "serve",
    params=[
        click.Argument(["model"], shell_complete=complete.models),
        click.Option(["--knobs"], metavar="FOLDER", help="Knobs to offer: the .knob files of a folder, by their names."),
        click.Option(["--name"], metavar="NAME", help="Name of the model for clients.  [default: the last part of MODEL]"),
        click.Option(["--host"], default="127.0.0.1", show_default=True, metavar="HOST", help="Address to listen at."),
        click.Option(["--port"], type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
        click.Option(["--unsafe-listen"], is_flag=True, help="Let other machines in; nothing is encrypted."),
        click.Option(["--allow-host", "hosts"], multiple=True, metavar="NAME", help="Another name that clients call this machine by."),
        click.Option(["--max-batch-tokens"], type=click.IntRange(1), default=16_384, show_default=True, help="Tokens that run at once, in all texts."),
        click.Option(["--max-rows"], type=click.IntRange(1), default=64, show_default=True, help="Texts that run at once."),
        click.Option(["--max-queue"], type=click.IntRange(1), default=64, show_default=True, help="Prompts that wait; one more is 429."),
        click.Option(["--max-body"], type=click.IntRange(1), default=1 << 20, show_default=True, help="Bytes of a request."),
        click.Option(["--log-prompts"], is_flag=True, help="Write prompts into the log too."),
        click.Option(["--replicas"], type=click.IntRange(1), help="Copies of the model behind Ray Serve."),
        *model_options(),
    ],
    callback=_serve,
    help=_serve.__doc__,
    short_help="A model with its knobs behind an address, by OpenAI's protocol.",
)  # fmt: skip


def _mcp(model: str, folder: str, http: bool, host: str, port: int, unsafe_listen: bool, **given: Any) -> None:
    """The instrument as tools of an agent, by the Model Context Protocol, over stdio: for the command of an agent's configuration.

    Tools describe the model, list and run methods, tap signals, make edits and knobs, search papers and check their claims. Results and
    knobs are kept in FOLDER, and nothing is read or written outside it. --http serves the same behind an address and a token.
    """
    try:
        from patchbay.serve.agents import run_http, run_stdio
        from patchbay.serve.instrument import Instrument
    except ImportError as error:
        raise _needs("mcp", error) from error
    instrument = Instrument(load_model(model, given, quiet=True), folder)
    if http:
        run_http(instrument, host, port, unsafe=unsafe_listen, say=click.echo)
    else:
        run_stdio(instrument)


mcp = click.Command(
    "mcp",
    params=[
        click.Argument(["model"], shell_complete=complete.models),
        click.Option(["--folder"], default="patchbay-results", show_default=True, metavar="FOLDER", help="Where Results and knobs are kept."),
        click.Option(["--http"], is_flag=True, help="Serve over HTTP (/mcp) instead of stdio."),
        click.Option(["--host"], default="127.0.0.1", show_default=True, metavar="HOST", help="Address to listen at, with --http."),
        click.Option(["--port"], type=click.IntRange(0, 65535), default=8001, show_default=True, help="0 takes a free one."),
        click.Option(["--unsafe-listen"], is_flag=True, help="Let other machines in; nothing is encrypted."),
        *model_options(),
    ],
    callback=_mcp,
    help=_mcp.__doc__,
    short_help="The instrument as an agent's tools, over stdio.",
)  # fmt: skip
