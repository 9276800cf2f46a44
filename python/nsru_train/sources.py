"""Sources of question-answer records: JSON files, TOFU, or fictitious authors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from nsru_kernels.files import atomic_write
from nsru_train.data.records import QA
from nsru_train.demo.authors import author_splits

TOFU_REPO = "locuslab/TOFU"
FIELDS = tuple(f.name for f in fields(QA))
_ALIASES = {"perturbed_answer": "perturbed_answers"}
_OPTION = re.compile(r"option\d+$")


def load_records(
    spec: str | Path, data_dir: str | Path | None = None, *, ignore_unknown: bool = False
) -> list[QA]:
    """Read question-answer records.

    Args:
        spec: a path to a .json or .jsonl file (one object a line, or one list of objects);
            "tofu:NAME" for a TOFU split such as tofu:forget01; or "authors:PART" with PART one of
            forget, retain, holdout, optionally followed by settings of `author_splits`, as in
            "authors:retain?authors=20&forget=2&seed=0".
        data_dir: folder that holds TOFU's NAME.json files; None reads them from the hub.
        ignore_unknown: drop fields that `QA` does not know instead of raising.

    Returns:
        The records in file order. TOFU's names are understood: `perturbed_answer`, and
        `option1`… whose wrong options become `perturbed_answers`.

    Raises:
        ValueError: missing or malformed input; the message names file, line and field.
    """
    source, _, name = str(spec).partition(":")
    if source == "tofu" and name:
        return _load_tofu(name, data_dir, ignore_unknown)
    if source == "authors" and name:
        return _load_authors(name)
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"records {str(spec)!r}: no such file. Give a .json/.jsonl path, 'tofu:forget01', or "
            "'authors:forget'"
        )
    return _parse_rows(_read_rows(path), str(path), ignore_unknown)


def save_records(path: str | Path, records: Sequence[QA]) -> None:
    """Write records as JSON lines that `load_records` reads back; the file appears whole or not."""
    rows = ({k: v for k, v in asdict(qa).items() if v not in (None, ())} for qa in records)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or item number, parsed object)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        yield from enumerate(rows, 1)
        return
    # Not splitlines(): answers may hold U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not a JSON object on one line ({error.msg} at column "
                    f"{error.colno})"
                ) from None


def _parse_rows(rows: Iterable[tuple[int, Any]], where: str, ignore_unknown: bool) -> list[QA]:
    records = []
    for number, row in rows:
        try:
            records.append(_parse_row(row, ignore_unknown))
        except ValueError as error:
            raise ValueError(f"{where}:{number}: {error}") from None
    if not records:
        raise ValueError(f"{where}: holds no records")
    return records


def _parse_row(row: Any, ignore_unknown: bool) -> QA:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with question and answer, got {type(row).__name__}")
    values: dict[str, Any] = {}
    options = []
    for key, value in row.items():
        field = _ALIASES.get(key, key)
        if _OPTION.match(key):
            options.append(value)
        elif field not in FIELDS:
            if not ignore_unknown:
                raise ValueError(f"unknown field {key!r}{_closest(key)}; accepted: {_accepted()}")
        elif field in values:
            raise ValueError(f"field {field!r} is given twice ({key!r} is another name for it)")
        elif value is not None:
            values[field] = value
    for name in ("question", "answer"):
        if name not in values:
            raise ValueError(f"field {name!r} is missing")
    if options and "perturbed_answers" not in values:
        values["perturbed_answers"] = tuple(o for o in options if o != values["answer"])
    return QA(**values)


def _closest(key: str) -> str:
    match = difflib.get_close_matches(key, FIELDS, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _accepted() -> str:
    return ", ".join((*FIELDS, *_ALIASES, "option1…"))


def _load_tofu(name: str, data_dir: str | Path | None, ignore_unknown: bool) -> list[QA]:
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.json"
        if not path.is_file():
            found = ", ".join(sorted(p.stem for p in Path(data_dir).glob("*.json"))) or "no *.json"
            raise ValueError(f"tofu:{name}: {path} does not exist; {data_dir} has: {found}")
        return _parse_rows(_read_rows(path), str(path), ignore_unknown)
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"tofu:{name}: the hub needs the 'datasets' package; install it, or give data_dir, a "
            f"folder with {name}.json from {TOFU_REPO}"
        ) from None
    try:
        rows = load_dataset(TOFU_REPO, name, split="train")
    except Exception as error:
        raise ValueError(
            f"tofu:{name}: {TOFU_REPO} could not be read from the hub ({error}); give data_dir, a "
            f"folder with {name}.json"
        ) from error
    return _parse_rows(enumerate(rows, 1), f"{TOFU_REPO}/{name}", ignore_unknown)


def _load_authors(name: str) -> list[QA]:
    part, _, query = name.partition("?")
    parts = ("forget", "retain", "holdout")
    if part not in parts:
        raise ValueError(f"authors:{name}: part must be one of {', '.join(parts)}, got {part!r}")
    settings = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in ("seed", "authors", "forget", "holdout"):
            raise ValueError(
                f"authors:{name}: unknown setting {key!r}; known: seed, authors, forget, holdout"
            )
        if not value.isdecimal():
            raise ValueError(f"authors:{name}: {key} must be a whole number, got {value!r}")
        settings[key] = int(value)
    return list(getattr(author_splits(**settings), part))
