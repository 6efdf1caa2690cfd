"""`patchbay mcp`: the instrument's tools by the Model Context Protocol, over stdio, or over HTTP behind the same door as the server.

The protocol is the official package's. Tools run in a thread, one at a time; they tell of their progress, and one that sweeps ends where
its call is cancelled. What a tool refuses is an error of the tool in its own words; any other error is an id.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp_types import CallToolResult, TextContent

from patchbay import __version__
from patchbay.errors import PatchbayError
from patchbay.serve.guard import Guard, Keys, noted
from patchbay.serve.instrument import Instrument, Stopped
from patchbay.serve.listen import address, bound, loopback, server
from patchbay.serve.run import TOKEN, logged

INSTRUCTIONS = """\
Patchbay finds the parts of a causal language model that do a thing, proves it causally and turns them like knobs.
Say what you expect before you run; find (which parts), prove (against random parts, with intervals), turn (a knob), then measure what
else changed. A rank says what a method measured, not what the model uses. Every Result is kept by name: hold later steps against it."""
Answer = tuple[str, dict[str, Any]]


def tools_of(instrument: Instrument) -> MCPServer[Any]:
    """The server of these tools."""
    server: MCPServer[Any] = MCPServer("patchbay", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING")

    def tool(function: Callable[..., Any]) -> None:
        about = getattr(Instrument, function.__name__).__doc__ or ""
        server.tool(description=" ".join(about.split()), structured_output=False)(function)

    async def describe_model(part: str | None = None) -> CallToolResult:
        return await _called(lambda _: instrument.describe_model(part))

    async def list_methods(verb: str | None = None) -> CallToolResult:
        return await _called(lambda _: instrument.list_methods(verb))

    async def method_help(method: str) -> CallToolResult:
        return await _called(lambda _: instrument.method_help(method))

    async def run_method(
        method: str, inputs: dict[str, Any], ctx: Context, save_as: str | None = None
    ) -> CallToolResult:
        return await _called(lambda progress: instrument.run_method(method, inputs, save_as, progress), ctx)

    async def tap(prompt: str, port: str, positions: list[int] | None = None) -> CallToolResult:
        return await _called(lambda _: instrument.tap(prompt, port, positions))

    async def edit_and_generate(
        prompt: str,
        edits: list[dict[str, Any]] | None = None,
        knobs: list[dict[str, Any]] | None = None,
        max_new_tokens: int = 20,
    ) -> CallToolResult:
        return await _called(lambda _: instrument.edit_and_generate(prompt, edits or (), knobs or (), max_new_tokens))

    async def save_knob(
        name: str, edits: list[dict[str, Any]], strength: float = 1.0, overwrite: bool = False
    ) -> CallToolResult:
        return await _called(lambda _: instrument.save_knob(name, edits, strength, overwrite))

    async def search_papers(words: str, limit: int = 10) -> CallToolResult:
        return await _called(lambda _: instrument.search_papers(words, limit))

    async def check_claim(key: str, seed: int = 0) -> CallToolResult:
        return await _called(lambda _: instrument.check_claim(key, seed))

    async def read_result(name: str, rows: int = 20, by: str = "value") -> CallToolResult:
        return await _called(lambda _: instrument.read_result(name, rows, by))

    for function in (
        describe_model,
        list_methods,
        method_help,
        run_method,
        tap,
        edit_and_generate,
        save_knob,
        search_papers,
        check_claim,
        read_result,
    ):
        tool(function)

    @server.resource("result://{name}", mime_type="application/json", description="A kept Result as data.")
    async def result(name: str) -> str:
        try:
            return json.dumps((await anyio.to_thread.run_sync(instrument.read_result, name, 50))[1])
        except PatchbayError as error:
            raise ResourceError(str(error)) from None

    return server


async def _called(
    function: Callable[[Callable[[int, int], None]], Answer], ctx: Context | None = None
) -> CallToolResult:
    """A tool's answer. What it prints goes to stderr: stdout is the protocol's."""
    stop = False

    def progress(done: int, total: int) -> None:
        if stop:
            raise Stopped
        if ctx is not None:
            anyio.from_thread.run(ctx.report_progress, float(done), float(total))

    def work() -> Answer:
        with redirect_stdout(sys.stderr):
            return function(progress)

    try:
        text, data = await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
    except PatchbayError as error:
        raise ToolError(str(error)) from None
    except Stopped:
        raise ToolError("cancelled") from None
    except Exception as error:
        raise ToolError(f"an error of the tool's own; in its log under {noted(error)}") from None
    finally:
        stop = True
    return CallToolResult(
        content=[TextContent(type="text", text=text)], structured_content=json.loads(json.dumps(data, default=str))
    )


def run_stdio(instrument: Instrument) -> None:
    """Serve the tools on this process's stdin and stdout, until stdin ends."""
    tools_of(instrument).run("stdio")


def http_app(instrument: Instrument, keys: Keys, hosts: Sequence[str] = ()) -> Guard:
    """The tools over HTTP, at /mcp, behind the door."""
    return Guard(tools_of(instrument).streamable_http_app(), keys, hosts)


def run_http(
    instrument: Instrument, host: str, port: int, *, unsafe: bool = False, say: Callable[[str], Any] = print
) -> None:
    """Serve the tools at an address, to who has the token, until stopped."""
    keys = Keys(os.environ.get(TOKEN) or None)
    with bound(host, port, unsafe=unsafe) as listening:
        say(f"{address(listening, '/mcp')} with the header Authorization: Bearer {keys.token}")
        logged()
        server(http_app(instrument, keys, () if loopback(host) else (host,))).run([listening])
