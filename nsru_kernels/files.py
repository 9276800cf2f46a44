"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


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
