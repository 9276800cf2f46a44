"""MUSE-News and MUSE-Books: their texts, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nsru_kernels.files import read_json
from nsru_train.data.encode import Encoded
from nsru_train.eval_results import Row
from nsru_train.guard import without_update
from nsru_train.metrics.muse import (
    GENERATED,
    RETRAINED_AUC,
    Items,
    benchmark,
    first_answer,
    to_log,
)
from nsru_train.metrics.privacy import min_k
from nsru_train.scoring import continuations, end_tokens, score_sequences
from nsru_train.sources import read_rows

# Configuration of the data set, split -> columns that are read.
SETS = {
    ("verbmem", "forget"): ("prompt", "gt"),
    ("knowmem", "forget_qa"): ("question", "answer"),
    ("knowmem", "forget_qa_icl"): ("question", "answer"),
    ("knowmem", "retain_qa"): ("question", "answer"),
    ("knowmem", "retain_qa_icl"): ("question", "answer"),
    ("privleak", "forget"): ("text",),
    ("privleak", "holdout"): ("text",),
}
# Metric -> the set that it is of.
ASKED = {
    "verbmem_f": ("verbmem", "forget"),
    "knowmem_f": ("knowmem", "forget_qa"),
    "knowmem_r": ("knowmem", "retain_qa"),
    "privleak": ("privleak", "forget"),
}
NEW_TOKENS = {"verbmem": 128, "knowmem": 32}
MOST_TOKENS = 2048  # OpenUnlearning's, of a text


class Muse:
    """MUSE's texts, read before any model is.

    Args:
        corpus: "news" or "books".
        folder: with the files of the hub's muse-bench/MUSE-News, or those that muse_bench's
            load_data.py writes, such as verbmem/forget.json; None reads them from the hub.
        retain_log: MUSE_EVAL.json of a model trained on the retain data alone, or its folder.

    Raises:
        ValueError: a set cannot be read, is empty or lacks a column, or the log no evaluation.
    """

    def __init__(self, corpus: str, folder: str | None = None, retain_log: str | None = None):
        self.corpus = corpus
        self.sets = {
            (config, split): _texts(corpus, folder, config, split, columns)
            for (config, split), columns in SETS.items()
        }
        self.retain_log = None if retain_log is None else _read_log(retain_log)
        self.log: dict[str, Any] = {}  # of the model evaluated last
        self.notes: list[str] = []
        if self.retain_log is None:
            self.notes.append(
                f"MUSE's privleak is against the AUC {RETRAINED_AUC[corpus]} of its authors' "
                "retrained model, OpenUnlearning's against 0.5; give the MUSE_EVAL.json of a model "
                "trained on your retain data only as muse_retain_log"
            )

    def evaluate(
        self, model: nn.Module, tokenizer: Any, *, base: bool, progress: bool = True
    ) -> list[Row]:
        """Both conventions' numbers, rows as `nsru_train.harness.Tasks.evaluate` gives them."""
        found: dict[str, dict[str, tuple[float, float]]] = {}
        if base:
            with without_update(model):
                found["before"] = self._numbers(self.items(model, tokenizer, progress=progress))
        found["after"] = self._numbers(self.items(model, tokenizer, progress=progress))
        task = f"MUSE-{self.corpus.title()}"
        return [
            {
                "task": (task, f"{task}, OpenUnlearning")[way],
                "metric": (name, GENERATED.get(name, name))[way],
                "questions": len(self.sets[asked]),
                **{label: numbers[name][way] for label, numbers in found.items()},
            }
            for way in (0, 1)
            for name, asked in ASKED.items()
        ]

    def items(self, model: nn.Module, tokenizer: Any, *, progress: bool = False) -> Items:
        """What the model generates and how likely it finds the texts: see `metrics.muse.Items`."""
        items: dict[str, Any] = {}
        rows = self.sets["verbmem", "forget"]
        texts = self._generate(model, tokenizer, "verbmem", [p for p, _ in rows], progress)
        items["verbmem_f"] = [
            {
                "generated": texts[prompt],
                "truth": _continuation(tokenizer, prompt, truth),
                "short": _decode(tokenizer, _ids(tokenizer, truth)[: NEW_TOKENS["verbmem"]]),
            }
            for prompt, truth in rows
        ]
        for name in ("knowmem_f", "knowmem_r"):
            split = ASKED[name][1]
            shots = self.sets["knowmem", f"{split}_icl"]
            before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
            asked = [
                (f"{before}Question: {question}\nAnswer: ", answer)
                for question, answer in self.sets["knowmem", split]
            ]
            texts = self._generate(model, tokenizer, "knowmem", [p for p, _ in asked], progress)
            items[name] = [
                {"generated": first_answer(texts[prompt]), "truth": answer}
                for prompt, answer in asked
            ]
        opening = len(_ids(tokenizer, ""))
        for split in ("forget", "holdout"):
            encoded = [
                Encoded(_ids(tokenizer, text), 1) for (text,) in self.sets["privleak", split]
            ]
            scores = score_sequences(
                model,
                tokenizer,
                encoded,
                max_tokens=max(4096, *map(len, encoded)),
                progress=progress,
            )
            # The first token has no probability; where none opens the text, that is one of its own.
            last = opening + MOST_TOKENS - 1
            items[split] = [
                {"min_k": min_k(score.nll), "min_k_cut": min_k(score.nll[:last][:-1])}
                for score in scores
            ]
        return items

    def _generate(
        self, model: Any, tokenizer: Any, kind: str, prompts: Sequence[str], progress: bool
    ) -> dict[str, str]:
        found = continuations(
            model,
            tokenizer,
            {prompt: _ids(tokenizer, prompt) for prompt in prompts},
            stop={tokenizer.eos_token_id, *end_tokens(model)},
            max_new_tokens=NEW_TOKENS[kind],
            progress=progress,
        )
        return {prompt: _decode(tokenizer, ids) for prompt, ids in found.items()}

    def _numbers(self, items: Items) -> dict[str, tuple[float, float]]:
        """Of each metric the benchmark's and OpenUnlearning's value."""
        self.log = to_log(items, self.retain_log)
        reference = (self.retain_log or {}).get("benchmark_auc", {}).get("agg_value")
        own = benchmark(items, RETRAINED_AUC[self.corpus] if reference is None else reference)
        return {
            name: (value, self.log[GENERATED.get(name, name)]["agg_value"])
            for name, value in own.items()
        }


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True).input_ids)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _continuation(tokenizer: Any, prompt: str, truth: str) -> str:
    """The text after a prompt as OpenUnlearning reads it back from its tokens."""
    start = _ids(tokenizer, prompt)
    whole = _ids(tokenizer, f"{prompt} {truth}")[: len(start) + MOST_TOKENS]
    return _decode(tokenizer, whole).replace(_decode(tokenizer, start), "").strip()


def _texts(
    corpus: str, folder: str | None, config: str, split: str, columns: Sequence[str]
) -> list[tuple[str, ...]]:
    """Rows of a set, a text for each column."""
    repo, rows = f"muse-bench/MUSE-{corpus.title()}", []
    where = f"muse: {repo if folder is None else folder} {config}/{split}"
    read: Iterable[Any]
    if folder is None:
        from datasets import load_dataset

        try:
            read = load_dataset(repo, config, split=split)
        except Exception as error:
            raise ValueError(
                f"{where} could not be read from the hub ({error}); give muse_dir, a folder with "
                "its files"
            ) from error
    else:
        files = sorted(Path(folder, config).glob(f"{split}[.-]*"))
        if not files:
            raise ValueError(f"{where}: no such file; expected {config}/{split}.json or .parquet")
        read = (row for _, row in read_rows(files[0]))
    for number, row in enumerate(read, 1):
        row = {columns[0]: row} if isinstance(row, str) and len(columns) == 1 else row
        if missing := [
            name
            for name in columns
            if not isinstance(row, Mapping) or not isinstance(row.get(name), str) or not row[name]
        ]:
            raise ValueError(f"{where}: row {number} has no {missing[0]!r}, a text.")
        rows.append(tuple(row[name] for name in columns))
    if not rows:
        raise ValueError(f"{where} is empty; give at least one row.")
    return rows


def _read_log(path: str) -> dict[str, Any]:
    file = Path(path, "MUSE_EVAL.json") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"muse_retain_log: no file {file}; give a folder with MUSE_EVAL.json.")
    log = read_json(file)
    found = log.get("mia_min_k") if isinstance(log, Mapping) else None
    auc = found.get("agg_value") if isinstance(found, Mapping) else None
    if not isinstance(auc, float) or not 0 <= auc < 1:
        raise ValueError(
            f"muse_retain_log: {file} has no mia_min_k with an agg_value in [0, 1), got {auc!r}."
        )
    return log
