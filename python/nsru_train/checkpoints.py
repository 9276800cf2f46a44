"""Checkpoints of a run: whether one is whole, what it belongs to, and which ones are kept."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nsru_kernels.files import read_json
from nsru_kernels.subspaces.collection import plain_parts

SUMS = "sha256.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, and an older one that can."""


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise DamagedCheckpointError where a file is missing, or cut off or changed on the disk."""
    for name in names:
        with blaming(folder, name, names):
            _read(folder / name)


def process_count(folder: Path) -> int:
    """Number of processes that wrote a checkpoint, by its random states; 0 where it has none."""
    if (folder / "rng_state.pth").exists():
        return 1
    numbers = (path.stem.removeprefix("rng_state_") for path in folder.glob("rng_state_*.pth"))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


@contextmanager
def blaming(folder: Path, name: str, names: Sequence[str]) -> Iterator[None]:
    """Turn whatever the block raises into DamagedCheckpointError: the file holds something odd.

    Args:
        names: all files of a whole checkpoint.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what readers raise on damaged files is not documented
        reason = f"{folder / name} is damaged ({type(error).__name__}: {str(error)[:200]})"
        if isinstance(error, FileNotFoundError):
            reason = f"{folder} holds no {name}"
        older = next((path for path in _before(folder) if _is_whole(path, names)), None)
        remedy = "No earlier checkpoint beside it is whole; start a new run."
        if older is not None:
            remedy = f"{older.name} is whole: remove {folder.name} to resume from there."
        raise DamagedCheckpointError(f"resume_from_checkpoint: {reason}. {remedy}") from error


def _read(path: Path) -> None:
    match path.suffix:
        case ".json":
            json.loads(path.read_text(encoding="utf-8"))
        case ".safetensors":
            safetensors.torch.load_file(path)
        case _:  # torch writes zip archives, with checksums that it does not look at itself
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum of {member}")


def _is_whole(folder: Path, names: Iterable[str]) -> bool:
    try:
        for name in names:
            _read(folder / name)
    except Exception:
        return False
    return True


def _before(folder: Path) -> list[Path]:
    """Checkpoints beside this one and of earlier steps, the latest first."""
    paths = _by_step(folder.parent)
    return paths[: paths.index(folder)][::-1] if folder in paths else []


def _by_step(run_dir: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*")}
    named = [path for path, step in steps.items() if step.isdecimal() and path.is_dir()]
    return sorted(named, key=lambda path: int(steps[path]))


def rotate(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete all but `limit` checkpoints by step, not by a clock, which may be set back.

    Those of later steps than the newest are left from before, and go first.
    """
    if not limit or limit < 1:
        return
    paths = _by_step(run_dir)
    after = paths.index(newest) + 1
    for path in [*paths[after:], *paths[:after]][:-limit]:
        if str(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def check_alike(found: Any, own: Any, name: str) -> None:
    """Raise TypeError unless ``found`` is of the form of ``own``, and its numbers are finite.

    It may hold more keys, as those of other versions do; what is None in ``own`` may be anything.
    """
    if isinstance(own, Tensor):
        alike = isinstance(found, Tensor) and found.shape == own.shape
        alike = alike and found.is_floating_point() == own.is_floating_point()
        alike = alike and bool(found.isfinite().all())
    elif isinstance(own, (list, tuple)):
        alike = isinstance(found, (list, tuple)) and len(found) == len(own)
    elif isinstance(own, numbers.Real):
        alike = isinstance(found, numbers.Real) and math.isfinite(found)
    else:
        alike = own is None or isinstance(found, type(own))
    if not alike:
        raise TypeError(f"{name} must be like {own!r:.60}, got {found!r:.60}")
    if isinstance(own, (list, tuple)):
        found, own = dict(enumerate(found)), dict(enumerate(own))
    for key in own if isinstance(own, Mapping) else ():
        check_alike(found.get(key), own[key], f"{name}[{key!r}]")


def check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise TypeError where the loaded state would fail or mislead a later step.

    Args:
        groups: the optimizer's param_groups before.
    """
    for found, own in zip(optimizer.param_groups, groups, strict=True):
        check_alike(found, own, "param_groups")
    for parameter, state in optimizer.state.items():
        if isinstance(optimizer, torch.optim.AdamW) and state:
            own = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            check_alike(state, own, "state")


def write_sums(folder: Path) -> None:
    """Keep the SHA-256 of every file of a checkpoint beside them."""
    text = json.dumps(_sums(folder), indent=2)
    (folder / SUMS).write_text(text + "\n", encoding="utf-8")


def changed_files(folder: Path) -> list[str]:
    """The files of a checkpoint that are not those that were saved there, by their sums.

    One that is taken from another checkpoint can be read, and nothing else tells it from its own.
    """
    saved = read_json(folder / SUMS) if (folder / SUMS).is_file() else {}
    return [name for name, own in _sums(folder).items() if saved.get(name, own) != own]


def _sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and every byte."""
    total = hashlib.sha256()
    plain = (part for pair in tensors for part in plain_parts(*pair).items())
    for name, tensor in plain:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
