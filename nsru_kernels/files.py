"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
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
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
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

    An error in the block (a full disk, say) leaves what was at ``path`` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged, previous = (path.with_name(f".{path.name}.{secrets.token_hex(4)}") for _ in range(2))
    staged.mkdir()
    try:
        yield staged
        if path.exists():
            os.replace(path, previous)
        os.replace(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
