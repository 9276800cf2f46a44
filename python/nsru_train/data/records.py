"""Question-answer records and where they come from: JSON files, TOFU, or fictitious authors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from nsru_kernels.files import atomic_write

SAFE_PARTS = ("acknowledge", "decline", "redirect")
TOFU_REPO = "locuslab/TOFU"
_ALIASES = {"perturbed_answer": "perturbed_answers"}
_OPTION = re.compile(r"option\d+$")


@dataclass(frozen=True)
class QA:
    """One question with its answer and, where known, what evaluation and unlearning need.

    Args:
        question, answer: non-empty text.
        paraphrased_question, paraphrased_answer: the same content in other words.
        perturbed_answers: wrong answers in the form of the (paraphrased) answer.
        safe_target: the response wanted instead, as text or as parts (see `SafeTargets`).
        topic: what the question is about, such as an author's name.

    Raises:
        ValueError: empty or non-text content, or unknown parts in safe_target.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    safe_target: str | Mapping[str, str] | None = None
    topic: str | None = None

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            _check_text(name, getattr(self, name))
        for name in ("paraphrased_question", "paraphrased_answer", "topic"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        wrong = self.perturbed_answers
        if isinstance(wrong, str):
            wrong = (wrong,)
        if not isinstance(wrong, Sequence):
            raise ValueError(f"perturbed_answers must be a list of texts, got {wrong!r}")
        for text in wrong:
            _check_text("perturbed_answers", text)
        object.__setattr__(self, "perturbed_answers", tuple(wrong))
        if isinstance(self.safe_target, Mapping):
            check_parts("safe_target", self.safe_target)
        elif self.safe_target is not None:
            _check_text("safe_target", self.safe_target)


FIELDS = tuple(f.name for f in fields(QA))


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be non-empty text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a surrogate pair at character {error.start}, got {value!r:.60}"
        ) from None


def check_parts(name: str, parts: Mapping[str, Any]) -> None:
    """Raise ValueError unless every key is one of SAFE_PARTS and every value is text."""
    unknown = sorted(set(parts) - set(SAFE_PARTS))
    if unknown:
        raise ValueError(
            f"{name} has unknown parts {unknown}; known parts: {', '.join(SAFE_PARTS)}"
        )
    for part, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} part {part!r} must be text, got {value!r}")


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
    from nsru_train.data.authors import author_splits

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


def normalise(text: str) -> str:
    """Case-folded text with runs of white space as one space."""
    return " ".join(text.casefold().split())


def check_disjoint(forget: Sequence[QA], retain: Sequence[QA]) -> None:
    """Raise ValueError when a set is empty or a question stands in both.

    Questions are compared without regard to case and white space. The same question with the same
    answer in both sets would be trained towards and away from at once.
    """
    for name, records in (("forget", forget), ("retain", retain)):
        if not records:
            raise ValueError(f"{name} set is empty; at least one question is needed")
    retained = {normalise(qa.question) for qa in retain}
    shared = [qa.question for qa in forget if normalise(qa.question) in retained]
    if shared:
        shown = "; ".join(repr(q) for q in shared[:3]) + ("; …" if len(shared) > 3 else "")
        raise ValueError(
            f"forget and retain sets share {len(shared)} of {len(forget)} forget questions: "
            f"{shown}. Remove them from one of the two"
        )


def tofu_authors(records: Sequence[QA], per_author: int = 20) -> list[list[QA]]:
    """Split records into consecutive runs of per_author questions: TOFU's authors, in order.

    Raises:
        ValueError: the number of records is not a multiple of per_author.
    """
    if per_author < 1 or len(records) % per_author:
        raise ValueError(
            f"{len(records)} records are no whole number of authors with per_author={per_author}"
        )
    return [list(records[i : i + per_author]) for i in range(0, len(records), per_author)]
