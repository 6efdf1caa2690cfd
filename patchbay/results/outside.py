"""Methods that live outside the package: in a file that is named by its path, or in an installed package.

    patchbay find ./stripes.py MODEL ...         the method of a file; ./stripes.py:NAME where the file has several
    [project.entry-points."patchbay.methods"]    of another package, which makes it `patchbay find stripes`:
    "find.stripes" = "my_package.stripes:stripes"

Such a method is a function made with `@patchbay.method(paper=KEY, verb="find")`. Its file is read as text (ast) for listings and for
`--help`; it is imported when it is called by name. Nothing else is: a saved Result that says where its method came from is data, and
runs no code, so that a replay must be given the file again. Imports nothing that computes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError, suggest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "patchbay.methods"
ROOMS = ("find", "prove", "turn", "decode", "measure", "train")
PACKAGE = Path(__file__).parent.parent
FORM = '@patchbay.method(paper=KEY, verb="find")'
TAKEN = ("all", "help")  # other commands of a room


def rooms() -> list[str]:
    """The verbs that there are."""
    return [room for room in ROOMS if (PACKAGE / room / "__init__.py").is_file()]


@dataclass(frozen=True)
class Outside:
    """A method outside the package: its file, its function's name, its verb; and the entry point that offers it, if one does."""

    path: Path
    name: str
    verb: str
    entry: EntryPoint | None = None

    @property
    def method_name(self) -> str:
        return f"{self.verb}.{self.name}"

    def load(self) -> Callable[..., Any]:
        """Import the file, or what the entry point names, and take the method. Raises PatchbayError where that cannot be done."""
        try:
            with redirect_stdout(sys.stderr):  # answers alone go to stdout
                found = _executed(self.path, self.name) if self.entry is None else self.entry.load()
        except PatchbayError:
            raise
        except (Exception, SystemExit) as error:
            raise PatchbayError(f"{self} cannot be imported: {type(error).__name__}: {_line(error)}") from error
        if getattr(found, "method_name", None) != self.method_name:
            raise PatchbayError(f"{self} is not the method {self.method_name}: its function is made with {FORM}")
        checked: Callable[..., Any] = found
        return checked

    def __str__(self) -> str:
        if self.entry is None:
            return f"{self.path}:{self.name}"
        return f"the entry point {self.entry.name!r} of {_package(self.entry)} ({self.entry.value})"


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or "it says nothing more"


# --- a file by its path -------------------------------------------------------------------------------


def is_path(text: str) -> bool:
    """Whether a text names a file and not a method of the package."""
    return "/" in text or "\\" in text or text.endswith(".py") or ".py:" in text


def named(text: str, verb: str = "") -> Outside:
    """The method that `FILE.py` or `FILE.py:NAME` names, by the file's text alone; with `verb`, one of that verb."""
    where, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    path = Path(where or text).expanduser()
    if path.suffix != ".py" or (not name and where != text):
        raise PatchbayError(f"{text!r} names no method; one outside the package is FILE.py, or FILE.py:NAME")
    found, functions = declared(path)
    if not found:
        has = f"its functions are {', '.join(functions)}" if functions else "it has no functions"
        raise PatchbayError(f"{path} has no method: {has}; a method is a function made with {FORM}")
    if name and name not in found:
        why = f"{name!r} is not made with {FORM}" if name in functions else f"{path} has no method {name!r}"
        raise PatchbayError(f"{why}; methods of {path} are {', '.join(found)}{suggest(name, list(found))}")
    if not name and len(found) > 1:
        raise PatchbayError(f"{path} has {len(found)} methods; name one: {', '.join(f'{path}:{one}' for one in found)}")
    name = name or next(iter(found))
    check_name(found[name], name, f"{path}:{name}")
    if verb and found[name] != verb:
        raise PatchbayError(f"{path}:{name} has verb={found[name]!r}: patchbay {found[name]} {text}")
    return Outside(path.absolute(), name, found[name])


def declared(path: Path) -> tuple[dict[str, str], list[str]]:
    """name -> verb of each function of a file made with @method ("" where it says none), and all its functions."""
    tree = _tree(path)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "patchbay"
        for alias in node.names
        if alias.name == "method"
    }
    found = {}
    for function in functions:
        for made in function.decorator_list:
            by = made.func if isinstance(made, ast.Call) else made
            if (isinstance(by, ast.Name) and by.id in aliases) or (
                isinstance(by, ast.Attribute) and by.attr == "method"
            ):
                given = made.keywords if isinstance(made, ast.Call) else []
                verb = next((one.value for one in given if one.arg == "verb"), None)
                found[function.name] = str(verb.value) if isinstance(verb, ast.Constant) else ""
    return found, [function.name for function in functions]


def _tree(path: Path) -> ast.Module:
    if path.is_dir():
        raise PatchbayError(f"{path} is a folder; a method outside the package is FILE.py, or FILE.py:NAME")
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except FileNotFoundError:
        raise PatchbayError(
            f"there is no file {path}; a method outside the package is FILE.py, or FILE.py:NAME"
        ) from None
    except OSError as error:
        raise PatchbayError(f"{path} cannot be read: {error.strerror or error}") from error
    except SyntaxError as error:
        raise PatchbayError(f"{path} is not Python: {error.msg}, line {error.lineno}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PatchbayError(f"{path} is not Python: {_line(error)}") from error


def check_name(verb: str, name: str, what: str) -> None:
    """Refuse a verb that there is not, and a name that cannot be a command or belongs to a method of the package."""
    if not verb:
        raise PatchbayError(f"{what} does not say which verb it is: {FORM}; verbs are {', '.join(rooms())}")
    if verb not in rooms():
        raise PatchbayError(f"{what} has verb={verb!r}; verbs are {', '.join(rooms())}{suggest(verb, rooms())}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or name in TAKEN:
        raise PatchbayError(
            f"{what}: {name!r} cannot name a method; a name is lower-case words joined by _, as stripe_heads"
        )
    if (PACKAGE / verb / f"{name}.py").is_file():
        raise PatchbayError(f"{what}: {verb}.{name} is a method of Patchbay itself; give yours another name")


def _executed(path: Path, name: str) -> Any:
    """The function of a file, which is executed once for each text that it has."""
    text = path.read_bytes()
    key = f"outside_{hashlib.sha256(str(path).encode() + text).hexdigest()[:12]}.{path.stem}"
    if key not in sys.modules:
        module = types.ModuleType(key)
        module.__file__ = str(path)
        sys.modules[key] = module
        try:
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[key]
            raise
    return getattr(sys.modules[key], name, None)


# --- entry points -------------------------------------------------------------------------------------


@functools.cache
def offered() -> tuple[EntryPoint, ...]:
    """The entry points of installed packages that offer methods; nothing of them is imported."""
    from importlib.metadata import entry_points

    return tuple({(one.name, one.value): one for one in entry_points(group=GROUP)}.values())


def offers(verb: str) -> list[str]:
    """Names of methods that installed packages offer for a verb, but those that Patchbay has itself."""
    names = {one.name.partition(".")[2] for one in offered() if one.name.partition(".")[0] == verb}
    return sorted(name for name in names if name.isidentifier() and not (PACKAGE / verb / f"{name}.py").is_file())


def entry(verb: str, name: str) -> Outside | None:
    """The method `verb.name` of an installed package, found without importing it; None where none offers it."""
    found = [one for one in offered() if one.name == f"{verb}.{name}"]
    if not found:
        return None
    if len(found) > 1:
        who = ", ".join(sorted(_package(one) for one in found))
        raise PatchbayError(f"{verb}.{name} is offered by several packages, {who}: keep one of them")
    one = found[0]
    where = f"the entry point {one.name!r} of {_package(one)}"
    path, (module, function) = _file_of(one.module), (one.module, one.attr)
    if path is None:
        raise PatchbayError(f"{where} names the module {module}, which is not there")
    methods, _ = declared(path)
    if function != name or function not in methods:
        has = ", ".join(methods) or "none"
        raise PatchbayError(f"{where} names {one.value}, which is no method {name!r}; methods of {path} are {has}")
    check_name(methods[function], function, where)
    if methods[function] != verb:
        raise PatchbayError(f"{where} names a function with verb={methods[function]!r}")
    return Outside(path, name, verb, one)


def _package(one: EntryPoint) -> str:
    return one.dist.name if one.dist is not None else "an unknown package"


def _file_of(module: str) -> Path | None:
    """The file of a module, found as an import would find it, without importing its packages."""
    places: Any = None
    spec = None
    parts = module.split(".")
    for i in range(len(parts)):
        full = ".".join(parts[: i + 1])
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((one for finder in finders if (one := finder.find_spec(full, places)) is not None), None)
        if spec is None:
            return None
        places = spec.submodule_search_locations
        if places is None and i < len(parts) - 1:
            return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


# --- where a method came from -------------------------------------------------------------------------


def origin(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Module, file and SHA-256 of the file of a function outside the package; None for one of the package."""
    if function.__module__.partition(".")[0] == "patchbay":
        return None
    path = Path(function.__code__.co_filename)
    held = path.is_file()
    return {
        "module": function.__module__,
        "file": str(path.resolve()) if held else None,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if held else None,
    }


def recorded(name: str, made: Mapping[str, Any], given: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The method of a record, among what was given, what is imported already, and entry points."""
    verb, _, short = name.rpartition(".")
    function = given.get(name) or getattr(sys.modules.get(str(made.get("module"))), short, None)
    if getattr(function, "method_name", None) != name:
        found = entry(verb, short)
        function = found.load() if found is not None else None
    file = made.get("file")
    if function is None:
        where = f"it came from {file}" if file else "it was defined in no file"
        gone = ", which is no longer there" if file and not Path(file).is_file() else ""
        raise PatchbayError(
            f"{name} is no method of this package: {where}{gone}. A record runs no code: name the file, "
            f"--method {file or 'FILE'}, or in Python replay(result, method=...) with the function or its file"
        )
    now = getattr(function, "origin", None) or {}
    if now.get("sha256") != made.get("sha256"):
        then, is_now = (str(one.get("sha256"))[:12] for one in (made, now))
        raise PatchbayError(
            f"{name}: its file has changed since, SHA-256 was {then}..., is {is_now}... ({now.get('file')}); give the file as it was, "
            "--method FILE, or in Python replay(result, method=FILE)"
        )
    return function  # type: ignore[no-any-return]


def by_name(given: Any) -> dict[str, Callable[..., Any]]:
    """Name -> method of what a replay was given: a function, a file, or several of these."""
    found = {}
    for one in given if isinstance(given, list | tuple) else () if given is None else (given,):
        function = one if callable(one) else named(str(one)).load()
        name = getattr(function, "method_name", None)
        if name is None:
            raise PatchbayError(f"method={one!r} is not made with {FORM}")
        found[name] = function
    return found
