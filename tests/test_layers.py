"""Who may import whom is one ordered line of rooms, and in a room of files; hooks lie in one room; importing the package imports nothing.

Every import counts: inside functions (kept there for start-up time) and under TYPE_CHECKING too. `pytest -s` prints the line.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import patchbay as pb
from patchbay import late
from tests import forked

ROOT = Path(pb.__file__).parent
LINE = [
    "errors",
    "late",
    "maths",
    "files",
    "signal",
    "edits",
    "jacks",
    "model",
    "tasks",
    "results",
    "sweeps",
    "wiring",
    "features",
    "knobs",
    "blocks",
    "corpus",
]
VERBS = ["find", "prove", "turn", "decode", "train", "measure"]
AFTER = ["tiny", "contract", "papers", "draw", "stories", "serve", "cli", "app"]
ROOMS = [*LINE, *VERBS, *AFTER]
FILES = {  # in these rooms each file imports only what stands before it; in the others, any order without a loop
    "signal": "card port channel positions",
    "edits": "probe edit apply together",
    "jacks": "defaults arguments modelled hooks notes sites features patterns attention operators sums attach history place session",
    "model": "families attached stream placing plain linear carried fingerprint precisions source recalled weights proofs self_check versions proving regime asked view given chats tokens text generate printed model cards load rotary trace shards kept filling run states caches packed check",
    "tasks": "words answers scoring checks own table rows task spell arithmetic entity_binding binding_counterfactuals facts indirect_object laundry_list "
    "needle_retrieval repeated_tokens successor",
    "results": "described outside saved letters arrays graph_file dashboards maps printed result shown record given method untrained replay",
    "sweeps": "kept settings calls layers restart difference plan joins walk identity scorer batch ray_executor whole_answers ranking sweep",
    "wiring": "timing components words wiring",
    "features": "hooks saved shapes dictionary folds files across formats load contexts reading lens",
    "knobs": "conflicts gguf vectors knob directions probing rows flags affine fold proof export",
    "blocks": "kinds convolved gla gate turned structured welore monet state_space lexinvariant meta_tokens trees prefix_bag next_vector subnetworks ngram two_way abs_topk dispatch host installed build",
    "draw": "graph style plot_wiring plot_circuit plot_attribution plot_dose plot_compare plot_number plot_effects plot report result_page coloured screen papers_shown result_lines",
    "contract": "held checks beside every",
    "serve": "guard listen asking named words prefill joined choosing work room engine answers api run replicas outside schema instrument agents",
    "app": "again cables document saved_page widget folder forms jobs asked features looks live partial worker runs feed pages opened",
    "cli": "signatures options complete prompt_files reading spoken outputs under commands rooms knob_commands why_command compare_command new papers_commands feed_commands check_method corpus_command harness_command serve_command ui_command",
}
UPWARD: dict[tuple[str, str], str] = {}  # imports that point up, and why: none
METHODS_THAT_TAKE_A_METHOD = {  # what they take is the other method's own number, not its Result
    ("find._direct", "find.direct_logit_attribution"),
    ("find.copy_suppression_heads", "find.direct_logit_attribution"),
    ("find.fact_heads", "find.direct_logit_attribution"),
    ("prove.circuit", "prove.edge_attribution"),
}
LONG: dict[str, str] = {}  # files of more than 400 lines, and the one idea that fills each: none

ACROSS = {  # test files of a room that follow no single file of it, and what they follow
    "app/browser": "the page in a real Chromium",
    "cli/cli": "commands as they are typed",
    "cli/output": "what leaves them: encodings, refusals",
    "cli/outside": "methods that lie outside the package",
    "decode/every_decoder": "what is true of every decoder",
    "draw/same_numbers": "every drawing, and every other form of its numbers",
    "jacks/calls": "sessions of threads, tasks and generators",
    "jacks/properties": "random splits, masks, interleavings, caches and options",
    "jacks/touched": "what edits touched, through masks, caches and chunks",
    "jacks/turns": "turns of a chat on one cache",
    "jacks/two_processes": "models that two processes share",
    "jacks/wrapped": "compiled, traced, replicated and checkpointed models",
    "model/adapters": "weights of models that carry adapters",
    "model/latent": "latent attention, from weights to knobs",
    "model/port_text": "ports named by text, wherever a port belongs",
    "model/stored": "quantised, offloaded, GGUF",
    "papers/papers": "the catalogue as people meet it",
    "results/edits_in_force": "Results made under edits",
    "serve/evaluations": "other people's evaluations, asked over the server",
    "tasks/tasks": "what is true of every task",
    "tiny/trained": "the shipped weights",
    "tiny/truth": "bars on programs whose truth is known",
    "turn/every_knob": "what is true of every knob",
    "wiring/graph": "the wiring as a graph, and drawn",
}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`results.result` for its file, `find` for a room's own, "" for the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.name != "__main__.py"}


@cache
def imports(tree: ast.AST) -> tuple[str, ...]:
    """Files of the package that are imported, wherever the import stands; the package itself is ""."""
    return tuple(_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            origin, _, below = (node.module or "").partition(".")
            if origin == "patchbay":
                for alias in node.names:
                    inner = f"{below}.{alias.name}".lstrip(".")
                    yield inner if inner in modules() else below
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "patchbay":
                    yield alias.name.partition(".")[2]


def room(name: str) -> str:
    return name.partition(".")[0]


def stands_before(found: str, name: str) -> bool:
    """Whether `name` may import `found` by the line of rooms, or of files in a room that has one."""
    here, there = room(name), room(found)
    if not found:
        return here in AFTER and here != "draw"  # who uses the package as everybody does
    if here != there:
        return ROOMS.index(there) < ROOMS.index(here) and not (here in VERBS and there in VERBS)
    files = FILES.get(here, "").split()
    place = {f"{here}.{file}": i for i, file in enumerate(files)}
    return name == here or not files or place[found] < place[name]


def breaches(name: str, tree: ast.AST) -> set[tuple[str, str]]:
    return {(name, found) for found in imports(tree) if not stands_before(found, name)}


def test_every_file_stands_in_the_line() -> None:
    print("\nthe import line:", " ".join(LINE), "| verbs, never one another:", " ".join(VERBS), "|", " ".join(AFTER))
    assert {room(name) for name in modules()} - {""} == set(ROOMS)
    assert set(ROOMS) == {p.stem for p in ROOT.iterdir() if p.name[0] not in "_." and p.suffix != ".typed"}
    for here, files in FILES.items():
        assert {name for name in modules() if name.startswith(f"{here}.")} == {f"{here}.{f}" for f in files.split()}
    assert 22 <= len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 33


def test_imports_point_down_but_for_those_named() -> None:
    found = {pair for name in modules() if name for pair in breaches(name, parse(modules()[name]))}
    assert found == set(UPWARD)


def test_the_rule_would_notice_a_breach() -> None:
    source = "from patchbay.signal.port import Port\nfrom patchbay import sweep\ndef f():\n    from patchbay.cli import main\n"
    assert breaches("edits.edit", ast.parse(source)) == {("edits.edit", ""), ("edits.edit", "cli")}
    guarded = "if TYPE_CHECKING:\n    from patchbay.model.model import Model\nif x:\n    import patchbay.model.run\n"
    assert breaches("model.view", ast.parse(guarded)) == {("model.view", "model.model"), ("model.view", "model.run")}
    assert breaches("find.channels", ast.parse("from patchbay.prove import _cells")) == {
        ("find.channels", "prove._cells")
    }


def test_no_file_is_in_a_loop() -> None:
    graph = {name: set(imports(parse(path))) - {name} for name, path in modules().items() if name}
    graph = {name: {found for found in needs if found} for name, needs in graph.items()}
    for name, found in UPWARD:
        graph[name].discard(found)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_method_takes_nothing_of_another_method() -> None:
    """What two methods need stands in a file of their room that starts with `_`; methods compose through Results."""
    taken = {
        (name, found)
        for name, path in modules().items()
        if room(name) in VERBS and "." in name
        for found in imports(parse(path))
        if room(found) == room(name) and not found.partition(".")[2].startswith("_")
    }
    assert taken == METHODS_THAT_TAKE_A_METHOD


@pytest.mark.parametrize(
    "path", [p for verb in ("prove", "decode", "measure") for p in sorted((ROOT / verb).glob("*.py"))]
)
def test_what_methods_share_is_in_a_shared_file(path: Path) -> None:
    """A method takes private names of no other method's file."""
    taken = [
        f"{node.module}: {alias.name}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.split(".")[-1].startswith("_")
        for alias in node.names
        if node.module.startswith("patchbay.")
        and alias.name.startswith("_")
        and node.module.count(".") > 1
        and alias.name.strip("_").islower()
        and f"{node.module}.{alias.name}".partition(".")[2] not in modules()
    ]
    assert taken == []


def test_long_files_are_named() -> None:
    """A file of more than 400 lines holds a second idea, or says here why it does not."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name for name, n in lines.items() if n > 400} == set(LONG)


def test_tests_lie_as_the_rooms_do() -> None:
    """tests/ROOM/test_FILE.py tests patchbay/ROOM/FILE.py, test_FILE_aspect.py a part of it; what follows no single file is named above. A method has one: test_catalogue."""
    files = {name.replace(".", "/").replace("/_", "/") for name in modules()} | set(map(room, modules()))
    here = Path(__file__).parent
    found = {
        path.relative_to(here).with_suffix("").as_posix().replace("test_", "", 1) for path in here.glob("*/test_*.py")
    }
    followed = {name for name in found for file in files if name == file or name.startswith(f"{file}_")}
    assert found - followed == set(ACROSS)
    assert {name.partition("/")[0] for name in found} == set(ROOMS) - {"errors", "late", "maths", "files", "contract"}


def hook_names(tree: ast.Module) -> set[str]:
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    marks = ("register_forward", "register_full_backward", "register_module_forward", "register_hook")
    named = ("_forward_hooks", "_forward_pre_hooks", "AttentionInterface", "AttentionMaskInterface")
    return {name for name in used if name.startswith(marks) or name in named}


def test_one_room_puts_hooks_on() -> None:
    touching = {room(name) for name, path in modules().items() if hook_names(parse(path))}
    assert touching == {"jacks", "contract"}  # the contract looks for hooks that were left, and makes runs fail


def test_what_draws_runs_no_model() -> None:
    """It reads Results, addresses and plain data: neither a model nor a method is within its reach, not even as a type."""
    taken = {found for name, path in modules().items() if room(name) == "draw" for found in imports(parse(path))}
    assert {room(found) for found in taken} == {"draw", "errors", "files", "signal", "results", "papers"}
    assert {found for found in taken if room(found) in ("results", "papers")} == {
        "results.graph_file",
        "results.letters",
        "results.maps",
        "results.printed",
        "results.result",
        "papers.claims",
    }


COMMANDS_TAKE = {  # what commands take beside the package's face, Results and signatures, and what tells and checks
    ("cli", "model.cards"): "`show`: a model and its parts as plain data",
    ("cli", "model.check"): "`families`: every port of a family proved",
    ("cli", "tiny.twins"): "`families`: a small model of each",
    ("cli.commands", "sweeps.settings"): "`--keep`, `--memory`, `--executor`: how sweeps run is no method's option",
    ("cli.knob_commands", "knobs.rows"): "`generate`: each prompt under its own knobs, told token by token",
    ("cli.under", "knobs.rows"): "`--each`: each prompt under its own knob",
    ("cli.prompt_files", "tasks.rows"): "`--prompts`: a file that has no answers gives its prompts",
    ("cli.ui_command", "late"): "`ui`: the page stands above the commands, whose forms it shows",
    ("cli.prompt_files", "tasks.table"): "`--prompts`: a file's columns",
    ("cli.harness_command", "measure.lm_eval"): "`harness`: the model that lm-evaluation-harness is to know",
}


def test_commands_read_results_and_signatures() -> None:
    """A command loads a model, calls a method by its name and reads what comes back: nothing of a method is within its reach."""
    told = {"", "cli", "errors", "files", "signal", "results", "contract", "papers", "draw", "stories", "serve"}
    taken = {(name, found) for name, path in modules().items() if room(name) == "cli" for found in imports(parse(path))}
    assert {(name, found) for name, found in taken if room(found) not in told} == set(COMMANDS_TAKE)


def test_commands_know_no_method_by_name() -> None:
    """What one method needs and others do not is said in its signature and its Result."""
    methods = {path.stem for verb in VERBS for path in (ROOT / verb).glob("[a-z]*.py")} - set(pb.__all__)
    methods |= {f"{path.parent.name}.{path.stem}" for verb in VERBS for path in (ROOT / verb).glob("[a-z]*.py")}
    methods |= {name.replace("_", "-") for name in methods}
    for path in sorted((ROOT / "cli").glob("*.py")):
        for node in ast.walk(parse(path)):
            word = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", "")
            assert not (isinstance(word, str) and word in methods), f"{path.name}:{node.lineno} names {word}"


def test_one_table_names_what_is_reached_late() -> None:
    """A module named in a text points up unseen: only the package's face, that of texts (its own room's files), that table and what calls methods by name do so."""
    named = {name for name, path in modules().items() if "import_module(" in path.read_text(encoding="utf-8")}
    assert {name for name in named if room(name) not in AFTER} == {"", "corpus", "late", "results.replay"}
    assert all(callable(late.late(name)) for name in late.LATE)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "xarray", "matplotlib", "typer", "rich")
    code = f"import sys, patchbay; print([m for m in {heavy} if m in sys.modules], [m for m in sys.modules if m[:9] == 'patchbay.'])"
    assert python(code) == "[] []"


def test_every_public_name_resolves_and_is_listed_once() -> None:
    assert list(pb.__all__) == sorted(set(pb.__all__))
    for name in pb.__all__:
        assert getattr(pb, name) is not None
    assert dir(pb) == list(pb.__all__)
    with pytest.raises(AttributeError, match="patchbay has no 'sweeep'; it has Dictionary, Directions, Edit, "):
        pb.sweeep  # noqa: B018
    shown = {
        alias.asname or alias.name
        for node in ast.walk(parse(ROOT / "__init__.py"))
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert shown == set(pb.__all__)  # what a reader's tools see is what there is


EXTRAS = ("measure.lm_eval", "measure.inspect_ai")  # of packages that need not be installed


def test_public_names_stay_what_they_are_when_every_file_is_imported() -> None:
    """In a process that has forgotten the package."""
    code = (
        "import types, importlib, patchbay as pb\n"
        f"for name in {[name for name in modules() if name and name not in EXTRAS]}: importlib.import_module('patchbay.' + name)\n"
        "print([name for name in pb.__all__ if isinstance(getattr(pb, name), types.ModuleType)])\n"
    )
    done = forked.python("-c", code, cwd=ROOT.parent)
    assert done.stdout.strip() == str(
        ["blocks", "corpus", "decode", "find", "measure", "prove", "tasks", "tiny", "train", "turn"]
    ), done.stderr
