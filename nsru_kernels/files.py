"""Files that are written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a whole file or nothing: a crash or a full disk leaves the previous content in place.

    Args:
        path: destination; its folder is made when absent.
        data: bytes, or text that is written as UTF-8.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        OSError: the write failed (same errno); the message names the file and says what is there
            now.
    """
    atomic_write_all({path: data})
    return Path(path)


def atomic_write_all(contents: Mapping[str | os.PathLike[str], bytes | str]) -> None:
    """``atomic_write`` for files that belong together: all is on the disk before the first rename.

    Only a crash in the instant between two renames can leave some files new and some old.
    """
    staged: dict[Path, Path] = {}  # temporary file → destination
    path = Path()
    try:
        for path, data in ((Path(p), d) for p, d in contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _staging(path)
            staged[temporary] = path
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        kept = "the previous file was kept" if path.exists() else "nothing was written"
        raise OSError(error.errno, f"{error.strerror}; {kept}", str(path)) from error
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write into; it takes the name of ``path`` only when the block ends well.

    An error in the block (a full disk, say) leaves what was at ``path`` as it was. A reader sees
    the one or the other, where the file system can exchange two names, as those of Linux can.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged, previous = _staging(path), _staging(path)
    staged.mkdir()
    try:
        yield staged
        if not path.exists():
            os.replace(staged, path)
        elif not _exchange(staged, path):
            os.replace(path, previous)
            os.replace(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises ValueError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def parse_json(text: str) -> Any:
    """Raises ValueError where text is not JSON, nests too deep, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    check_unique(key for key, _ in pairs)
    return dict(pairs)


def check_unique(keys: Iterable[Any]) -> None:
    """Raise ValueError where a key of an object stands twice."""
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"key {key!r} stands twice in one object; keep one of the two")
        seen.add(key)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is damaged or holds something else.
        OSError: it cannot be read.
    """
    try:
        found = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}). Copy it again, or write it anew."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}.")
    return found


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file.

    Raises:
        ValueError: it is damaged or of another kind.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # what safetensors raises names no file
        pass
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            names = file.keys()  # a handle, not a dict
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) is truncated or damaged, no whole safetensors "
            f"file ({error}). Copy it again, or write it anew."
        ) from error


def check_fields(
    path: str | os.PathLike[str], found: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Raise ValueError unless every field is there, of its type, and its numbers finite.

    Args:
        path: the file that ``found`` was read from.
        fields: name → type hint: of JSON values, unions, lists and dicts of them.
    """
    for name, hint in fields.items():
        if name not in found or not _fits(found[name], hint):
            got = f"{found[name]!r:.80}" if name in found else "none"
            kind = getattr(hint, "__name__", hint) if isinstance(hint, type) else hint
            raise ValueError(f"{path}: {name} must be {kind} and finite, got {got}.")


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed had begun in ``folder``. No writer may be at work."""
    for path in Path(folder).glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths trade places in one step; False where the system cannot."""
    renameat2 = None
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, ctypes.c_uint(2)  # of fcntl.h and linux/fs.h
    names = os.fsencode(first), os.fsencode(second)
    return renameat2(at_fdcwd, names[0], at_fdcwd, names[1], rename_exchange) == 0
