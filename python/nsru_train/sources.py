"""Sources of question-answer records: JSON, CSV and Parquet files, TOFU, fictitious authors."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

from nsru_kernels.files import atomic_write, parse_json, read_text
from nsru_train.data.records import QA, tofu_authors
from nsru_train.demo.authors import author_splits

logger = logging.getLogger(__name__)

TOFU_REPO = "locuslab/TOFU"
FIELDS = tuple(f.name for f in fields(QA))
_ALIASES = {"perturbed_answer": "perturbed_answers"}
_JSON_CELLS = {"perturbed_answers": "[", "alternatives": "[", "safe_target": "{"}
_OPTION = re.compile(r"option\d+$")


def load_records(
    spec: str | Path,
    data_dir: str | Path | None = None,
    *,
    ignore_unknown: bool = False,
    question_column: str = "question",
    answer_column: str = "answer",
    domain_column: str = "domain",
) -> list[QA]:
    """Read question-answer records.

    Args:
        spec: a path to a .json or .jsonl file (one object a line, or one list of objects), or to a
            .csv, .tsv or .parquet file; "tofu:NAME" for a TOFU split such as tofu:forget01; or
            "authors:PART" with PART one of forget, retain, holdout, optionally followed by settings
            of `author_splits`, as in "authors:retain?authors=20&forget=2&seed=0".
        data_dir: folder that holds TOFU's NAME.json files; None reads them from the hub.
        ignore_unknown: say nothing about fields that `QA` does not know. They are ignored with one
            warning, or refused where they look like a misspelt field.
        question_column: name of the questions' field in a file.
        answer_column: name of the answers' field.
        domain_column: name of the domains' field.

    Returns:
        The records in file order. TOFU's names are understood: `perturbed_answer`, and
        `option1`… whose wrong options become `perturbed_answers`. So are chats of one question:
        `messages`, and `prompt` with `completion`. In a CSV file several `perturbed_answers` are a
        JSON list in one cell, the parts of a `safe_target` a JSON object.

    Raises:
        ValueError: missing or malformed input; the message names file, line and field.
    """
    source, _, name = str(spec).partition(":")
    if source == "tofu" and name:
        return _by_author(name, _load_tofu(name, data_dir, ignore_unknown))
    if source == "authors" and name:
        return _load_authors(name)
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"records {str(spec)!r}: no such file. Give a .json, .jsonl, .csv or .parquet path, "
            "'tofu:forget01', or 'authors:forget'"
        )
    columns = {"question": question_column, "answer": answer_column, "domain": domain_column}
    names: dict[str, str] = {}
    for field, column in columns.items():
        if column in names:
            raise ValueError(f"{names[column]}_column and {field}_column are both {column!r}")
        names[column] = field
    return _parse_rows(read_rows(path), str(path), ignore_unknown, names)


def save_records(path: str | Path, records: Sequence[QA]) -> None:
    """Write records as JSON lines that `load_records` reads back; the file appears whole or not.

    Args:
        path: of the file; its folder is made if need be.
        records: in the order of the lines; fields without content are left out.

    Raises:
        ValueError: the name is that of a table, whose suffix would say how to read it.
        OSError: it cannot be written; a file that was there before is unharmed.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"save_records: path must end in .jsonl, got {path}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _to_lines(records))


def digest(records: Sequence[QA]) -> str:
    """Tells whether two sets hold the same records in the same order, wherever they come from."""
    return hashlib.sha256(_to_lines(records).encode()).hexdigest()[:16]


def _to_lines(records: Sequence[QA]) -> str:
    rows = ({k: v for k, v in asdict(qa).items() if v not in (None, ())} for qa in records)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or item number, parsed object)."""
    if path.suffix == ".parquet":
        yield from enumerate(_read_parquet(path), 1)
        return
    text = read_text(path)
    if path.suffix in (".csv", ".tsv"):
        yield from _read_csv(path, text)
        return
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield from enumerate(rows, 1)
        return
    # Not splitlines(): answers may hold U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not a JSON object on one line ({error.msg} at column "
                    f"{error.colno})"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    # newline="" leaves line breaks inside a quoted cell to the reader.
    lines = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name, out of {', '.join(names)}")
        for cells in lines:
            if len(cells) > len(names):
                raise ValueError(f"{len(cells)} cells for {len(names)} columns")
            if cells:
                yield (
                    lines.line_num,
                    {name: _cell(name, text) for name, text in zip(names, cells, strict=False)},
                )
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}:{lines.line_num}: not valid CSV ({error})") from None


def _cell(name: str, text: str) -> Any:
    """Several wrong answers, and the parts of a safe target, are JSON in a cell."""
    begins = _JSON_CELLS.get(_ALIASES.get(name, name))
    if begins and text.startswith(begins):
        try:
            return parse_json(text)
        except ValueError as error:
            raise ValueError(f"{name} begins like JSON and is none: {error}") from None
    return text or None  # an empty cell says nothing


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise ValueError(f"{path}: Parquet needs the 'pyarrow' package; install it") from None
    try:
        return read_table(path).to_pylist()
    except Exception as error:  # pyarrow has errors of many kinds
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None


def _parse_rows(
    rows: Iterable[tuple[int, Any]],
    where: str,
    ignore_unknown: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[QA]:
    records = []
    ignored: dict[str, None] = {}
    for number, row in rows:
        try:
            qa, unknown = _parse_row(row, ignore_unknown, names)
        except ValueError as error:
            raise ValueError(f"{where}:{number}: {error}") from None
        records.append(qa)
        ignored |= dict.fromkeys(unknown)
    if not records:
        raise ValueError(f"{where}: holds no records")
    if ignored and not ignore_unknown:
        logger.warning("%s: ignored columns: %s.", where, ", ".join(ignored))
    return records


def _parse_row(row: Any, ignore_unknown: bool, names: Mapping[str, str]) -> tuple[QA, list[str]]:
    """The record, and the names of the fields that `QA` does not know."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with question and answer, got {type(row).__name__}")
    renamed = {field: key for key, field in names.items()}
    texts = {"question", "answer", *(renamed.get(name, name) for name in ("question", "answer"))}
    if texts.isdisjoint(row):
        row = _from_chat(row)
    values: dict[str, Any] = {}
    options = []
    unknown = []
    for key, value in row.items():
        field = names.get(key) or _ALIASES.get(key, key)
        if renamed.get(field, key) != key:
            unknown.append(key)  # a column named answer where another one was chosen
        elif _OPTION.match(key):
            options.append(value)
        elif field not in FIELDS:
            unknown.append(key)
            # question_id is no slip of the pen for question, but anser is one for answer.
            close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.85)
            if close and not ignore_unknown:
                raise ValueError(
                    f"unknown field {key!r} (did you mean {close[0]!r}?); accepted: {_accepted()}"
                )
        elif field in values:
            raise ValueError(f"field {field!r} is given twice ({key!r} is another name for it)")
        elif value is not None:
            values[field] = value
    for name in ("question", "answer"):
        if name not in values:
            found = ", ".join(row) or "nothing"
            raise ValueError(f"field {renamed.get(name, name)!r} is missing; found: {found}")
    if options and "perturbed_answers" not in values:
        if values["answer"] not in options:
            raise ValueError(f"none of the options is the answer {values['answer']!r:.60}")
        values["perturbed_answers"] = tuple(o for o in options if o != values["answer"])
    return QA(**values), unknown


def _from_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`messages`, or `prompt` and `completion`, as question and answer; other rows as they are."""
    if "messages" in row:
        chat = {"messages": ["user", "assistant"]}
    elif "prompt" in row and "completion" in row:
        chat = {"prompt": ["user"], "completion": ["assistant"]}
    else:
        return row
    rest = {key: value for key, value in row.items() if key not in chat}
    texts: list[Any] = []
    for name, roles in chat.items():
        if isinstance(row[name], str) and len(roles) == 1:
            texts.append(row[name])
            continue
        for message in _check_messages(name, row[name], roles):
            texts.append(message.get("content"))
            # Reasoning and calls of tools are fields that nothing reads, too.
            more = message.keys() - {"role", "content"}
            rest |= {f"{name}.{key}": message[key] for key in sorted(more)}
    question, answer = texts
    if "completion" in chat and isinstance(answer, str):
        answer = answer.lstrip(" ")  # which parts it from a prompt that it is appended to
    return {"question": question, "answer": answer, **rest}


def _check_messages(name: str, messages: Any, roles: list[str]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"{name} must be a list of messages, got {messages!r:.60}")
    found = [message.get("role") for message in messages]
    if found != roles:
        raise ValueError(
            f"{name} must be one message of each of {', '.join(roles)}, got {found}"
            + ("; give the system message as data.system_prompt" if "system" in found else "")
        )
    return messages


def _accepted() -> str:
    return ", ".join((*FIELDS, *_ALIASES, "option1…"))


def _load_tofu(name: str, data_dir: str | Path | None, ignore_unknown: bool) -> list[QA]:
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.json"
        if not path.is_file():
            found = ", ".join(sorted(p.stem for p in Path(data_dir).glob("*.json"))) or "no *.json"
            raise ValueError(f"tofu:{name}: {path} does not exist; {data_dir} has: {found}")
        return _parse_rows(read_rows(path), str(path), ignore_unknown)
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


def _by_author(name: str, records: list[QA]) -> list[QA]:
    """Records to forget with their author as domain, which TOFU tells by their places alone."""
    if not name.startswith("forget"):
        return records
    try:
        authors = tofu_authors(records)
    except ValueError:  # a part of one
        return records
    return [
        replace(qa, domain=f"author {number}")
        for number, author in enumerate(authors, 1)
        for qa in author
    ]


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
