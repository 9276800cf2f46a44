"""A run's folder: what was asked for, where it ran, and what came out.

config.yaml  environment.json  metrics.jsonl  results.json  report.html  figures/  adapter/
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from nsru_kernels.files import atomic_write

RESULTS_SCHEMA = 1


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

    Args:
        path: the folder; made when absent.

    Example:
        >>> run = RunFolder("runs/first")
        >>> run.log_metrics({"step": 10, "loss": 0.7})
        >>> run.write_results({"kind": "train", "seconds": 12.5}).name
        'results.json'
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"RunFolder: {self.path} is a file; give the path of a folder, new or existing."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.results_path = self.path / "results.json"
        self.report_path = self.path / "report.html"
        self.adapter_dir = self.path / "adapter"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def figures_dir(self) -> Path:
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Write the resolved configuration to config.yaml, keys in the order given."""
        return atomic_write(
            self.config_path, yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        )

    def write_environment(self) -> Path:
        """Write versions, devices, git commit, command line and time to environment.json."""
        from nsru_kernels.environment import describe_environment

        environment = {
            **describe_environment(),
            "commit": git_commit(),
            "argv": sys.argv,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return atomic_write(self.environment_path, to_json(environment, indent=1) + "\n")

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics_path, "ab+") as file:
            # A killed run may have left half a line; start on a fresh one.
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write((to_json(row) + "\n").encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order; a line cut off by a kill is left out."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def drop_metrics_after(self, step: int) -> None:
        """Remove the rows of later steps from metrics.jsonl; all rows when step is 0."""
        rows = self.read_metrics() if step else []
        kept = (to_json(row) + "\n" for row in rows if row.get("step", math.inf) <= step)
        atomic_write(self.metrics_path, "".join(kept))

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write results.json in one piece; ``schema`` is filled in when absent."""
        return atomic_write(
            self.results_path, to_json({"schema": RESULTS_SCHEMA, **results}, indent=1) + "\n"
        )

    def read_results(self) -> dict[str, Any]:
        """Read results.json.

        Raises:
            FileNotFoundError: the run has not written results yet.
            ValueError: the file is not JSON, or of a schema this version does not know.
        """
        path = self.results_path
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the run has not finished, or {self.path} is no run folder."
            )
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
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
        return results


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
