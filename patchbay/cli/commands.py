"""Commands made from functions: MODEL, task and parts, and one option for each keyword-only parameter of the signature.

A method is imported when its own command is run, never to list it. Shared by all commands: how a model and a task are given.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from patchbay.cli import complete, options, prompt_files, reading
from patchbay.cli.outputs import output_options, refuse_to_replace, show
from patchbay.cli.signatures import UNKNOWN, Source, parameters_of, source
from patchbay.cli.under import under, under_options
from patchbay.results import outside
from patchbay.results.described import COMMON, words
from patchbay.signal.port import PatchbayError, suggest

if TYPE_CHECKING:
    from patchbay import Model

DTYPES = ("float32", "float16", "bfloat16", "float64")
PARTS_HELP = "Parts, as L3.H5,L2.H1, or FOLDER:3 for the best 3 of a saved Result"
CALLED = "patchbay.command"  # in what click's contexts share: the command that was called


class Commands(click.Group):
    """A group that suggests near misses, and takes `_` for `-` in names."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name.replace("_", "-"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].replace("_", "-")
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            what = "command" if ctx.parent is None else "method"
            where = f"patchbay {ctx.info_name} has" if ctx.parent is not None else "commands are"
            ctx.fail(f"no {what} {args[0]!r}; {where} {', '.join(known) or 'none'}{suggest(name, known)}")
        found = super().resolve_command(ctx, args)
        ctx.meta[CALLED] = found[1]
        return found


# --- options that commands share ----------------------------------------------------------------------


def json_option() -> click.Option:
    return click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document.")


def model_options() -> list[click.Parameter]:
    return [
        click.Option(["--dtype"], type=click.Choice(DTYPES), help="Precision to load the weights in."),
        click.Option(["--device"], metavar="NAME", help="Where to run: cpu, cuda, cuda:1, mps."),
        click.Option(["--trust-remote-code"], is_flag=True, help="Let the model's folder run its own Python code."),
        click.Option(
            ["--dictionary", "dictionaries"],
            multiple=True,
            metavar="FOLDER[@PLACE]",
            help="A sparse dictionary whose features are parts of the model (L3.F12); PLACE such as L3.resid_out. May be given more than once.",
        ),
    ]


def task_options(taken: Sequence[str], *, many: bool = False, word: str = "") -> list[click.Parameter]:
    several = (" May be given more than once." if many else "") + (f" {_sentence(word)}" if word else "")
    rows = {
        "task": ("--task", str, "NAME[:KEY=VALUE,...]", f"Task to make for the model (see `patchbay tasks`), or a file of prompts.{several}"),
        "prompts": ("--prompts", str, "FILE", "Own prompts: JSON, CSV, TSV or plain text with prompt and, where needed, right, wrong, corrupted, labels, marks; "
                    "FILE:prompt=question,wrong=b+c says which columns."),
        "n": ("--n", int, "N", "Number of prompts."),
        "metric": ("--metric", str, "NAME", "Score of an answer: logit_diff, probability, log_probability, rank, accuracy."),
    }  # fmt: skip
    return [
        click.Option([flag], type=kind, metavar=metavar, help=text, multiple=many and name == "task",
                     shell_complete=complete.tasks if name == "task" else None)
        for name, (flag, kind, metavar, text) in rows.items()
        if name in ("task", "prompts") or name not in taken
    ]  # fmt: skip


def sweep_options() -> list[click.Parameter]:
    return [
        click.Option(["--keep"], metavar="FOLDER", help="Keep a sweep's finished batches; the same call goes on from them."),
        click.Option(["--memory"], type=click.FloatRange(0, min_open=True), metavar="GB", help="What a sweep may take.  [default: 2]"),
        click.Option(["--executor"], type=click.Choice(("local", "ray")), help="Where a sweep runs.  [default: local]"),
        click.Option(["--workers"], type=click.IntRange(1), help="Processes of the ray executor.  [default: 2]"),
    ]  # fmt: skip


def sweeps(given: Mapping[str, Any], shown: Mapping[str, Any]) -> AbstractContextManager[None]:
    """How the sweeps of a command are run: as its options say, shown as they go."""
    from patchbay.sweeps.settings import using

    told = {"folder": given.get("keep"), "executor": given.get("executor"), "workers": given.get("workers")}
    told["memory"] = None if given.get("memory") is None else int(given["memory"] * 1e9)
    return using(**{key: value for key, value in told.items() if value is not None}, **shown)


def load_model(source: str, given: Mapping[str, Any], *, quiet: bool = False) -> Model:
    """Load as asked, with transformers' own bars and warnings off."""
    from patchbay.draw import screen

    if not source.strip():
        raise PatchbayError(f"{source!r} is no model; a model is a local folder, a hub name, or a built-in one")
    with screen.working(f"loading {source}", quiet=quiet):
        import torch
        from transformers.utils import logging

        import patchbay as pb

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        device, dtype = given.get("device"), given.get("dtype")
        if device is not None:
            _check_device(str(device))
        model = pb.load(
            source,
            dtype=getattr(torch, dtype) if dtype else None,
            device=device,
            trust_remote_code=bool(given.get("trust_remote_code")),
        )
        asked = [text.rpartition("@") if "@" in text else (text, "", "") for text in given.get("dictionaries") or ()]
        held = [pb.load_dictionary(folder, at=place or None) for folder, _, place in asked]
        return model.with_dictionaries(*held) if held else model


def _check_device(name: str) -> None:
    import torch

    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    if name not in found and not (name == "cuda" and "cuda:0" in found):
        raise PatchbayError(f"no device {name!r} here; found {', '.join(found)}" + suggest(name, found))


def make_task(model: Model, given: Mapping[str, Any], *, texts: bool = False) -> Any:
    """The task of `--task` or `--prompts`, with `--n`, `--seed` and `--metric`; with `texts`, prompts without answers, too."""
    text, path = given.get("task") or None, given.get("prompts")
    if (text is None) == (path is None):
        raise PatchbayError(
            f"give one of --task and --prompts, got {'both' if text else 'neither'}; tasks are {', '.join(options.tasks())}"
        )
    if isinstance(text, tuple) and len(text) > 1:
        return [make_task(model, {**given, "task": one}) for one in text]
    if text is not None:
        name = text[0] if isinstance(text, tuple) else text
        task = reading.read_task(name, model, n=given.get("n"), seed=given.get("seed"))
    else:
        own = prompt_files.first(prompt_files.read_prompts(str(path), model, texts=texts), given.get("n"))
        if isinstance(own, list):
            if given.get("metric"):
                raise PatchbayError(f"--metric scores answers, and the prompts of {path} have none")
            return own
        task = own
    return task.with_metric(given["metric"]) if given.get("metric") else task


# --- commands of methods ------------------------------------------------------------------------------


def method_command(room: str, name: str, found: outside.Outside | None = None) -> click.Command:
    """The command of one method: MODEL, the task and parts that it acts on, and each keyword-only option; read from its file."""
    path = options.files(room)[name] if found is None else found.path
    file, takes = source(path), parameters_of(source(path), name)
    said = words(ast.get_docstring(cast("ast.FunctionDef", file.function(name))) or "", list(takes))
    made: list[click.Parameter] = [click.Argument(["model"], required="model" in takes, shell_complete=complete.models)]
    if room == "decode":
        made.append(click.Argument(["typed"], nargs=-1, metavar="[PROMPT]..."))
        made += under_options()
    if {"task", "prompts"} & set(takes):
        own = next(said[key] for key in ("task", "prompts") if key in takes)
        made += task_options(list(takes), many=_takes_tasks(takes), word="" if own in COMMON.values() else own)
    if _takes_text(takes):
        made.append(click.Option(["--prompt"], metavar="TEXT", help="One text, in place of a task."))
    for key, parameter in takes.items():
        if key not in ("model", "task", "prompts", "seed") and options.writable(parameter.annotation):
            made.append(_option(key, parameter, said.get(key, "")))
    made.append(click.Option(["--seed"], type=int, help="Of the task's prompts and of random draws."))
    made += [*(sweep_options() if room == "prove" else []), *model_options(), json_option()]
    made += output_options()

    def callback(**given: Any) -> None:
        own = None if found is None else found.load()  # what cannot be imported is said before a model is loaded
        run_method((lambda: options.load_method(room, name)) if own is None else (lambda: own), takes, given)

    return click.Command(
        name.replace("_", "-"),
        params=made,
        callback=callback,
        help=_help_text(file, name),
        short_help=file.doc.split("\n")[0],
    )


def _help_text(file: Source, name: str) -> str:
    """The file's docstring, or the function's where the file has none."""
    function = file.function(name)
    doc = file.doc or (ast.get_docstring(function) if function is not None else "") or ""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in doc.split("\n\n"))


def _takes_tasks(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a method takes several tasks at once."""
    return "task" in takes and bool({"list", "Sequence"} & options.names_in(takes["task"].annotation))


def _takes_text(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a text will do where a method takes a task."""
    return "task" in takes and "str" in options.names_in(takes["task"].annotation)


def all_command() -> click.Command:
    """`patchbay find all MODEL`: the survey."""
    made: list[click.Parameter] = [click.Argument(["model"], shell_complete=complete.models), *task_options(())]
    made.append(
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of prompts and of random draws.")
    )
    made.append(
        click.Option(["--curves/--no-curves"], default=True, show_default=True, help="Joint knockout of each role.")
    )
    made += [*model_options(), json_option(), *output_options()]

    def callback(**given: Any) -> None:
        from patchbay.draw import result_lines, screen
        from patchbay.stories.survey import find_all

        refuse_to_replace(given)
        quiet = given["as_json"]
        model = load_model(given["model"], given, quiet=quiet)
        task = make_task(model, given) if given.get("task") or given.get("prompts") else None
        with screen.progress("find all", quiet=quiet) as bar:
            result = find_all(
                model, task=task, n=32 if given["n"] is None else given["n"], seed=given["seed"], curves=given["curves"],
                progress=lambda done, total, what: bar(done, total),
            )  # fmt: skip
        show(result, given)
        if not quiet:
            screen.say(*result_lines.roles(result, given["rows"]))

    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in options.doc("stories/survey").split("\n\n"))
    return click.Command("all", params=made, callback=callback, help=text)


def _option(key: str, parameter: inspect.Parameter, word: str = "") -> click.Option:
    """One option, with its word from the method's docstring."""
    flag, hint, word = f"--{key.replace('_', '-')}", parameter.annotation, _sentence(word)
    needed = parameter.default is parameter.empty and key != "knob"  # a knob's file may stand in the model's place
    default = None if parameter.default in (parameter.empty, None, UNKNOWN) else parameter.default
    if hint is bool and not needed:
        return click.Option([f"{flag}/--no-{flag[2:]}", key], default=default, show_default=True, help=word)
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    if "Part" in options.names_in(hint):
        flags = [flag, "--heads"] if key == "parts" else [flag]
        text = PARTS_HELP + ("; FOLDER for the whole of it." if "Result" in options.names_in(hint) else ".")
        text = f"{text} {word}"
        return click.Option([*flags, key], multiple=True, required=needed, metavar="PARTS", help=text, shell_complete=complete.parts)  # fmt: skip
    text = word if shown is None else f"{word}  [default: {shown}]"
    return click.Option([flag, key], required=needed, metavar=options.shown_type(hint).upper(), help=text)


def _sentence(word: str) -> str:
    """A word as a sentence of help: a capital first, no backticks."""
    word = word.replace("`", "")
    return word[:1].upper() + word[1:] if word[1:2].islower() or word[1:2] == " " else word


def run_method(
    load: Callable[[], Callable[..., Any]], takes: Mapping[str, inspect.Parameter], given: dict[str, Any]
) -> None:
    """Load, read what was given, call, save, print."""
    from patchbay.draw import screen

    refuse_to_replace(given)
    quiet = given["as_json"]
    if "knob" in takes and given["model"] and not given.get("knob") and ".knob" in Path(given["model"]).name:
        given |= {"knob": given["model"], "model": _made_on(given["model"])}
    if "knob" in takes and takes["knob"].default is inspect.Parameter.empty and not given.get("knob"):
        raise click.UsageError("Missing option '--knob'.")
    model = load_model(given["model"], given, quiet=quiet) if given["model"] else None
    call = read_call(model, takes, given)
    function = load()
    name = str(getattr(function, "method_name", function.__name__))
    with screen.sweeping(name, quiet=quiet) as shown:
        returned = called(function, call, model, given, shown)
    show(returned, given)


def read_call(model: Model | None, takes: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a method from the options of its command; what was not given is left out."""
    call: dict[str, Any] = {}
    for key, parameter in takes.items():
        if key == "model":
            call[key] = model
        elif key in ("task", "prompts"):
            assert model is not None
            if parameter.default is None and not (given.get("task") or given.get("prompts")):
                continue  # something else stands for it, or its absence is refused in the method's own words
            call[key] = _text_or_task(model, given, texts=key == "prompts")
        elif key == "items":
            call[key] = given[key]  # a file or a task by its name, which meters read themselves
        elif (value := given.get(key)) not in (None, ()):
            call[key] = _value(value, parameter.annotation, f"--{key.replace('_', '-')}", model)
    return call


def called(
    function: Callable[..., Any],
    call: dict[str, Any],
    model: Model | None,
    given: Mapping[str, Any],
    shown: Mapping[str, Any],
) -> Any:
    """What the method returns under the command's knobs, its sweeps run and shown as they were told."""
    acted_on = call.get("prompts", call.get("task"))
    with sweeps(given, shown), under(model, given, acted_on):
        return function(**call)


def _made_on(text: str) -> str:
    """The source of the model that the knob of a file was made on, where a knob stands in the model's place."""
    found = reading.read_knob(text)
    if not found.made_on.get("source"):
        raise PatchbayError(f"{text} does not say which model it was made on: give the model first, and --knob {text}")
    return str(found.made_on["source"])


def _text_or_task(model: Model, given: Mapping[str, Any], *, texts: bool) -> Any:
    """The texts of the command line, or of `--prompt`, or the task or prompts."""
    if given.get("typed"):
        if given.get("task") or given.get("prompts"):
            raise PatchbayError("prompts are written after the model, or given by --task or --prompts: not both")
        return list(given["typed"])
    if given.get("prompt") is None:
        return make_task(model, given, texts=texts)
    for name in ("task", "prompts", "n", "metric"):
        if given.get(name) not in (None, ()):
            raise PatchbayError(f"--prompt is one text, in place of --task and --prompts: without --{name}")
    return given["prompt"]


def _value(value: Any, hint: Any, what: str, model: Model | None) -> Any:
    if isinstance(value, tuple):  # parts, given once or several times
        if "Result" in options.names_in(hint) and len(value) == 1 and Path(value[0]).is_dir():
            import patchbay as pb

            return pb.load_result(value[0])
        parts = reading.read_parts(value, model)
        many = {"Sequence", "list", "tuple", "Iterable"} & options.names_in(hint)
        if not many and len(parts) > 1:
            raise PatchbayError(f"{what} takes one part, got {', '.join(map(str, parts))}")
        return parts if many else parts[0]
    return reading.read(value, hint, what, model) if isinstance(value, str) else value
