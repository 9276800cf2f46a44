"""MUSE-News and MUSE-Books: their texts, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nsru_kernels.files import read_json
from nsru_train.answering import continuations
from nsru_train.data.encode import Encoded
from nsru_train.eval_results import Row
from nsru_train.guard import without_update
from nsru_train.language_models import end_tokens
from nsru_train.metrics.muse import (
    GENERATED,
    RETRAINED_AUC,
    Items,
    benchmark,
    first_answer,
    to_log,
)
from nsru_train.metrics.open_unlearning import find_log
from nsru_train.metrics.privacy import min_k
from nsru_train.scoring import score_share
from nsru_train.shares import Shares
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
        self.retain_log = None
        if retain_log is not None:
            answers = [answer for _, answer in self.sets["knowmem", "forget_qa"]]
            self.retain_log = _read_log(retain_log, answers)
        self.log: dict[str, Any] = {}  # of the model evaluated last
        self.notes: list[str] = []
        if self.retain_log is None:
            self.notes.append(
                f"MUSE's privleak is against the AUC {RETRAINED_AUC[corpus]} of its authors' "
                "retrained model, OpenUnlearning's against 0.5; give the MUSE_EVAL.json of a model "
                "trained on your retain data only as muse_retain_log"
            )

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        base: bool,
        progress: bool = True,
        shares: Shares = Shares(),  # noqa: B008
    ) -> list[Row]:
        """Both conventions' numbers, rows as `nsru_train.harness.Tasks.evaluate` gives them."""

        def numbers() -> dict[str, tuple[float, float]]:
            return self._numbers(self.items(model, tokenizer, progress=progress, shares=shares))

        found: dict[str, dict[str, tuple[float, float]]] = {}
        if base:
            with without_update(model):
                found["before"] = numbers()
        found["after"] = numbers()
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

    def items(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        progress: bool = False,
        shares: Shares = Shares(),  # noqa: B008
    ) -> Items:
        """Continuations by the model, and how likely it finds the texts: `metrics.muse.Items`."""
        asked = {"verbmem_f": self.sets["verbmem", "forget"]}
        for name in ("knowmem_f", "knowmem_r"):
            split = ASKED[name][1]
            shots = self.sets["knowmem", f"{split}_icl"]
            before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
            asked[name] = [
                (f"{before}Question: {question}\nAnswer: ", answer)
                for question, answer in self.sets["knowmem", split]
            ]
        encoded = {
            (side, i): Encoded(_ids(tokenizer, text), 1)
            for side in ("forget", "holdout")
            for i, (text,) in enumerate(self.sets["privleak", side])
        }
        for (side, i), text in encoded.items():
            if len(text.input_ids) < 3:
                raise ValueError(
                    f"muse: privleak/{side}: row {i + 1} has {len(text.input_ids)} tokens, "
                    f"expected 3 or more: {self.sets['privleak', side][i][0]!r}; remove it."
                )
        # The first token has no probability; where none opens the text, that is one of its own.
        last = len(_ids(tokenizer, "")) + MOST_TOKENS - 1

        def share() -> tuple[dict[tuple[str, str], str], dict[int, Any]]:
            texts = {
                (name, prompt): _decode(tokenizer, ids)
                for name, rows in asked.items()
                for prompt, ids in continuations(
                    shares,
                    model,
                    tokenizer,
                    {prompt: _ids(tokenizer, prompt) for prompt, _ in rows},
                    stop={tokenizer.eos_token_id, *end_tokens(model)},
                    max_new_tokens=NEW_TOKENS[ASKED[name][0]],
                    progress=progress,
                ).items()
            }
            scores = score_share(
                shares,
                model,
                tokenizer,
                [*encoded.values()],
                progress=progress,
            )
            return texts, {
                i: {"min_k": min_k(one.nll), "min_k_cut": min_k(one.nll[:last][:-1])}
                for i, one in scores.items()
            }

        parts = shares.gather(share)
        said = {key: text for texts, _ in parts for key, text in texts.items()}
        likely = {i: row for _, rows in parts for i, row in rows.items()}
        items: dict[str, Any] = {
            name: [
                {"generated": first_answer(said[name, prompt]), "truth": truth}
                for prompt, truth in asked[name]
            ]
            for name in ("knowmem_f", "knowmem_r")
        }
        items["verbmem_f"] = [
            {
                "generated": said["verbmem_f", prompt],
                "truth": _continuation(tokenizer, prompt, truth),
                "short": _decode(tokenizer, _ids(tokenizer, truth)[: NEW_TOKENS["verbmem"]]),
            }
            for prompt, truth in asked["verbmem_f"]
        ]
        for side in ("forget", "holdout"):
            items[side] = [likely[i] for i, (own, _) in enumerate(encoded) if own == side]
        return items

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


def _read_log(path: str, answers: Sequence[str]) -> dict[str, Any]:
    file = find_log(path, "MUSE_EVAL.json", "muse_retain_log")
    log = read_json(file)
    found = log.get("mia_min_k")
    auc = found.get("agg_value") if isinstance(found, Mapping) else None
    if not isinstance(auc, float) or not 0 <= auc < 1:
        raise ValueError(
            f"muse_retain_log: {file} has no mia_min_k with an agg_value in [0, 1), got {auc!r}."
        )
    rows = (log.get(GENERATED["knowmem_f"]) or {}).get("value_by_index") or {}
    theirs = [row.get("ground_truth") for row in rows.values() if isinstance(row, Mapping)]
    # White space does not count: tokenizers clean it up.
    if theirs and ["".join(str(t).split()) for t in theirs] != [
        "".join(a.split()) for a in answers
    ]:
        raise ValueError(
            f"muse_retain_log: {file} is of other questions: {len(theirs)}, the first one answered "
            f"{theirs[0]!r:.60}, not {len(answers)} and {answers[0]!r:.60}; give that of the same "
            "corpus."
        )
    return log
