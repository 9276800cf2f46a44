"""A run's folder: what was asked for, where it ran, and what came out.

config.yaml  environment.json  metrics.jsonl  results.json  report.html  figures/  adapter/
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

from nsru_kernels.files import (
    atomic_write,
    check_fields,
    parse_json,
    read_text,
    remove_leftovers,
)

logger = logging.getLogger(__name__)

RESULTS_SCHEMA = 1
# What is read of results.json beside numbers, which are taken where they are some.
_RUN = {"method": str, "seed": int | str, "step": int}
_ROWS: dict[str, dict[str, Any]] = {
    "methods": _RUN,
    "frontier": _RUN,
    "examples": {"split": str},
    "attacks": {"name": str},
    "tasks": {"task": str, "metric": str, "questions": int, "group": str}
    | dict.fromkeys(("before", "before_stderr", "after", "after_stderr"), float),
    "subspaces": {"name": str, "modules": list[str], "rank": int, "spectrum": list[float | None]},
    "leakage": {"module": str, "method": str, "rounding": float},
}
_SECTIONS = {"setup": dict, "metrics": dict, "notes": list[str]}
_METRICS_ROW = {"seconds": float, "seed": int | str, "method": str}
_LOCK = ".lock"
_OWN = ("adapter", "adapters", "runs")  # folders in which nobody else keeps files
_held: set[Path] = set()  # locks of this process, for another may have had its number before


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialise to standard JSON: NaN and infinities become null; tensors and paths are taken."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"to_json: cannot write a {type(value).__name__} as JSON: {value!r}")


class RunFolder:
    """One run's folder with its files under fixed names.

    Under torchrun only the first process writes: writing does nothing in the others.

    Args:
        path: the folder; made when absent.

    Examples:
        >>> run = RunFolder("runs/first")
        >>> run.log_metrics({"step": 10, "loss": 0.7})
        >>> run.write_results({"kind": "train", "seconds": 12.5}).name
        'results.json'
    """

    def __init__(self, path: str | Path):
        if not str(path):
            raise ValueError("out must be the path of a folder, got ''.")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"RunFolder: {self.path} is a file; give the path of a folder, new or existing."
            )
        inside = [self.path / "figures"]
        if (self.path.parent / "config.yaml").is_file():  # a run's own folder, such as eval
            inside.append(self.path)
        for folder in inside:
            if folder.is_symlink():
                raise ValueError(
                    f"out: {folder} is a link to {folder.resolve()}, where files of another folder "
                    "would be replaced; remove it."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.results_path = self.path / "results.json"
        self.report_path = self.path / "report.html"
        self.adapter_dir = self.path / "adapter"
        self._release: weakref.finalize | None = None
        self.writes = os.environ.get("RANK", "0") == "0"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def figures_dir(self) -> Path:
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def lock(self) -> RunFolder:
        """Keep other processes' runs out, until `unlock` or the end of this object.

        What a killed run left half-written is removed. Nothing happens where this process holds
        the lock already.

        Raises:
            ValueError: another run is in the folder; of one on another host it is not known
                whether it still runs.
        """
        path = (self.path / _LOCK).resolve()
        if not self.writes or path in _held:
            return self
        own = {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            with path.open("x") as file:
                json.dump(own, file)
        except FileExistsError:
            owner = _owner(path)
            here = owner["host"] == own["host"]
            if not here or (owner["pid"] != own["pid"] and psutil.pid_exists(owner["pid"])):
                raise ValueError(
                    f"out: {self.path} is in use by process {owner['pid']} on {owner['host']}. "
                    f"Give another folder; if that run is gone, remove {path}."
                ) from None
            logger.warning(
                "Taking %s over from process %d on %s, which has ended.",
                *(self.path, owner["pid"], owner["host"]),
            )
            atomic_write(path, json.dumps(own))
        _held.add(path)
        self._release = weakref.finalize(self, _unlock, path, os.getpid())
        shutil.rmtree(self.path / ".partial", ignore_errors=True)
        remove_leftovers(self.path)
        for name in _OWN:
            for folder in self.path.glob(f"{name}/**"):
                remove_leftovers(folder)
        return self

    def unlock(self) -> None:
        """Let other processes in, where this object has locked them out."""
        if self._release is not None:
            self._release()

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Write the resolved configuration to config.yaml, keys in the order given."""
        return self._write(
            self.config_path, yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        )

    def _write(self, path: Path, text: str) -> Path:
        return atomic_write(path, text) if self.writes else path

    def write_environment(self) -> Path:
        """Write versions, devices, git commit, command line and time to environment.json."""
        from nsru_kernels.environment import describe_environment

        environment = {
            **describe_environment(),
            "commit": git_commit(),
            "argv": sys.argv,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return self._write(self.environment_path, to_json(environment, indent=1) + "\n")

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        try:
            with open(self.metrics_path, "ab+") as file:
                # A killed run may have left half a line; start on a fresh one.
                if file.tell() and _last_byte(file) != b"\n":
                    file.write(b"\n")
                file.write((to_json(row) + "\n").encode())
        except OSError as error:  # of a full disk, without the name
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order; a line cut off by a kill is left out.

        Raises:
            ValueError: a line is something else than a row; the message names file and line.
        """
        if not self.metrics_path.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics_path.read_bytes().split(b"\n"), 1):
            where = f"{self.metrics_path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
                if not line.strip() or _is_cut_off(line):
                    continue
            if not isinstance(row, dict) or not isinstance(row.get("step", ""), int | None):
                raise ValueError(
                    f"{where}: expected a row with its step, as training writes them, got "
                    f"{line[:40]!r}; restore the file or move it away."
                )
            _check_present(where, row, _METRICS_ROW)
            rows.append(row)
        return rows

    def drop_metrics_after(self, step: int) -> None:
        """Remove the rows of later steps from metrics.jsonl; all rows when step is 0."""
        rows = self.read_metrics() if step else []
        self._write(
            self.metrics_path,
            "".join(to_json(row) + "\n" for row in rows if (row["step"] or 0) <= step),
        )

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write results.json in one piece; ``schema`` is filled in when absent."""
        return self._write(
            self.results_path, to_json({"schema": RESULTS_SCHEMA, **results}, indent=1) + "\n"
        )

    def read_results(self, **fields: Any) -> dict[str, Any]:
        """Read results.json.

        Args:
            fields: name -> type hint of what must be there.

        Raises:
            FileNotFoundError: the run has not written results yet.
            ValueError: the file is not JSON, of a schema this version does not know, or a value is
                of another type than it should be.
        """
        path = self.results_path
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the run has not finished, or {self.path} is no run folder."
            )
        try:
            results = parse_json(read_text(path))
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); run the command again."
            ) from error
        schema = results.get("schema") if isinstance(results, dict) else None
        if schema != RESULTS_SCHEMA:
            raise ValueError(
                f"{path}: expected schema {RESULTS_SCHEMA}, got {schema!r}; "
                "it was written by another version of nsru_train."
            )
        check_fields(path, results, fields)
        sections = {**dict.fromkeys(_ROWS, list[dict]), **_SECTIONS}
        filled = {name: value for name, value in results.items() if value}
        _check_present(path, filled, sections)
        _check_present(path, filled.get("setup", {}), {"questions": dict})
        for name, fields in _ROWS.items():
            for row in results.get(name) or []:
                _check_present(path, row, fields)
        return results


def _check_present(path: str | Path, found: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """`check_fields` of those that are there: each may be missing, or null as NaN is."""
    there = {name: hint for name, hint in fields.items() if found.get(name) is not None}
    check_fields(path, found, there)


def _is_cut_off(line: bytes) -> bool:
    """True where a row could have begun like this: rows are ASCII but for what a run names."""
    return line.startswith(b"{") and line.decode(errors="replace").isprintable()


def _owner(lock: Path) -> dict[str, Any]:
    try:
        owner = json.loads(lock.read_bytes())
        return {"pid": int(owner["pid"]), "host": str(owner["host"])}
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{lock} does not say which process has the folder; if no run is in it, remove it."
        ) from None


def _unlock(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a forked worker
        _held.discard(path)
        path.unlink(missing_ok=True)


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def git_commit(folder: str | Path | None = None) -> str | None:
    """Commit of the git checkout that holds ``folder`` (default: this package), None outside git.

    Ends in ``-dirty`` when tracked files differ from the commit.
    """
    folder = Path(folder) if folder is not None else Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
