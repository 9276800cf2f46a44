"""VerbMem, KnowMem and PrivLeak of MUSE, as its own code has them and as OpenUnlearning does.

The two read the same generations and log-probabilities. Source: Shi et al. 2024, arXiv 2407.06460.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nsru_train.metrics.open_unlearning import rel_diff
from nsru_train.metrics.privacy import membership_auc, privleak
from nsru_train.metrics.text import rouge_l_f1

# AUC of the benchmark's own retrained models on Min-40%, forget against holdout: Llama-2-7B on
# News, ICLM-7B on Books. 1 where holdout texts are the likelier ones, other than ours.
RETRAINED_AUC = {"news": 0.4772, "books": 0.5393}
# Where an answer of KnowMem ends.
STOPS = ("\n\n", "\nQuestion", "Question:")
GENERATED = {"verbmem_f": "forget_verbmem_ROUGE", "knowmem_f": "forget_knowmem_ROUGE",
             "knowmem_r": "retain_knowmem_ROUGE"}  # fmt: skip

# verbmem_f, knowmem_f, knowmem_r -> rows of "truth" and "generated", and of VerbMem "short", the
# truth's first tokens, as many as are generated; forget, holdout -> rows of "min_k", and of
# "min_k_cut" without the last token and what lies beyond 2048.
Items = Mapping[str, Sequence[Mapping[str, Any]]]


def first_answer(text: str) -> str:
    """A generated text, up to where it begins to ask further questions."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def benchmark(items: Items, reference_auc: float) -> dict[str, float]:
    """verbmem_f, knowmem_f, knowmem_r and privleak of muse_bench, in percent.

    ROUGE-L F without a stemmer; VerbMem against as many tokens as are generated.

    Args:
        reference_auc: `benchmark_auc` of a model trained on the retain data alone.
    """
    found = {
        name: 100
        * fmean(
            rouge_l_f1(row.get("short", row["truth"]), row["generated"], stemmer=False)
            for row in items[name]
        )
        for name in GENERATED
    }
    return {**found, "privleak": privleak(1 - benchmark_auc(items), 1 - reference_auc)}


def benchmark_auc(items: Items) -> float:
    """AUC of Min-40% as muse_bench counts it: the share of pairs whose holdout text is likelier."""
    return 1 - membership_auc(*([row["min_k"] for row in items[s]] for s in ("forget", "holdout")))


def to_log(items: Items, retain_log: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """OpenUnlearning's MUSE_EVAL.json: {metric: {agg_value, value_by_index}}.

    ROUGE-L F with a stemmer as a share, VerbMem against the whole text. KnowMem's prompts are not
    cut at 512 tokens, which would take the question away. `benchmark_auc` is there too.

    Args:
        retain_log: of a model trained on the retain data alone, for privleak; 0.5 without it.
    """
    log: dict[str, Any] = {}
    for name, theirs in GENERATED.items():
        rows = [
            {
                "rougeL_f1": rouge_l_f1(row["truth"], row["generated"]),
                "ground_truth": row["truth"],
                "generation": row["generated"].strip(),
            }
            for row in items[name]
        ]
        log[theirs] = _logged(fmean(row["rougeL_f1"] for row in rows), rows)
    scores = {s: [row["min_k_cut"] for row in items[s]] for s in ("forget", "holdout")}
    auc = membership_auc(scores["forget"], scores["holdout"])
    sides = {
        split: _logged(-fmean(values), [{"score": -value} for value in values])
        for split, values in scores.items()
    }
    log["mia_min_k"] = {**sides, "auc": auc, "agg_value": auc}
    reference = 0.5 if retain_log is None else retain_log["mia_min_k"]["agg_value"]
    log["privleak"] = {"agg_value": rel_diff(1 - auc, 1 - reference)}
    log["benchmark_auc"] = {"agg_value": benchmark_auc(items)}
    return log


def _logged(value: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"agg_value": value, "value_by_index": {str(i): row for i, row in enumerate(rows)}}
