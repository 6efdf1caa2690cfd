"""Files and folders written whole or not at all.

A file or folder is first made beside its place under a hidden name and forced to disk, then moved into place. Where that fails,
for want of space or by Ctrl-C, all is as it was before: what was there stays, and nothing of the new is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from patchbay.errors import PatchbayError

Writer = Callable[[Path], object]  # writes what is to be saved to the path that it is given
PARTIAL = ".partial"  # how names of what is not yet in its place end


def write_file(path: str | Path, content: bytes | Writer) -> Path:
    """Write one file, its folders with it, whole or not at all; one that is there is replaced."""
    target = Path(os.path.realpath(path))
    with _beside(target) as fresh:
        _fill(fresh, content)
        os.replace(fresh, target)
    _sync(target.parent)
    return target


def write_folder(path: str | Path, content: Mapping[str, bytes] | Writer) -> Path:
    """Write a folder, whole or not at all; one that is there is replaced, and is back in its place if that fails."""
    target = Path(os.path.realpath(path))
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    with _beside(target) as fresh:
        fresh.mkdir()
        if isinstance(content, Mapping):
            for name, data in content.items():
                _fill(fresh / name, data)
        else:
            content(fresh)
            for path in fresh.rglob("*"):
                _sync(path)
        _sync(fresh)
        try:
            if target.exists():
                os.rename(target, old)
            os.rename(fresh, target)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            elif old.exists():
                shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)
    return target


def record_of(folder: Path, name: str, what: str) -> Any:
    """The JSON file `name` that says what a folder holds; None where there is no folder, or an empty one.

    Raises PatchbayError for a folder that holds something else than `what`, and for a file that cannot be read.
    """
    path = folder / name
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PatchbayError(f"{path} cannot be read: {error}") from error
    if folder.is_dir() and any(not found.name.endswith(PARTIAL) for found in folder.iterdir()):
        raise PatchbayError(f"{folder} is not empty and not {what}: choose another folder")
    return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder that is there for the block, against other calls and processes that do the same; one that ends, killed or not, lets go.

    Raises PatchbayError where another holds it. Systems without such locks (Windows, some network file systems) hold nothing.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PatchbayError(
            f"{folder} is being written to by another call: let it end, or give another folder"
        ) from None
    except OSError:  # not on this file system
        pass
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A free path beside the target, whose folders are made; when the block fails, it and they are gone again."""
    blocked = next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise PatchbayError(f"could not save to {target}: {blocked} is a file, not a folder; nothing was written")
    made = [parent for parent in [target.parent, *target.parent.parents] if not parent.exists()]
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
    except BaseException as error:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        with contextlib.suppress(OSError):
            fresh.unlink()
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise PatchbayError(f"could not save to {target}: {reason(error)}; nothing was written") from error
        raise


def reason(error: Exception) -> str:
    """Why a write failed, in the words of the operating system; safetensors reports its errors as text with their number."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(number.group(1))) if number else str(error)


def _fill(path: Path, content: bytes | Writer) -> None:
    """Write one new file and force it to disk."""
    if not isinstance(content, bytes):
        content(path)
        _sync(path)
        return
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Force what stands in a folder, or in a file that others wrote, to disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)
