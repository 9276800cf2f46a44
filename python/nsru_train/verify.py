"""Check of an export: base, adapter (through peft alone) and merged model side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nsru_kernels.files import read_json
from nsru_kernels.hf.peft_format import (
    CONFIG,
    SIDECAR,
    adaptable_layers,
    adapted_names,
    check_fingerprint,
    read_adapter,
)
from nsru_kernels.nn.inputs import evaluating
from nsru_kernels.nn.wrapped import linear_sizes
from nsru_kernels.text_table import align_columns
from nsru_train.answering import greedy_answers
from nsru_train.data.encode import collate, encode_qa, pad_token_id
from nsru_train.data.records import QA
from nsru_train.language_models import load_language_model
from nsru_train.losses.nll import AnswerLogits, answer_logits, unmasked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Mean KL(base ‖ adapter) in nats a token below which an adapter counts as doing nothing. Two
# orders of summation in the same fp32 model differ by about 1e-12.
NO_EFFECT_KL = 1e-6
# Largest logit difference between adapter and merged model, relative to the largest logit, by dtype
# of the merged weights: their rounding, carried through the layers. int8: a base by LLM.int8, which
# rounds activations too.
MERGE_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.int8: 5e-2,
}
# A merge may move the forget answers by at most this share of what the adapter moved them.
MERGE_KL_SHARE = 0.1

_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Model by name, each with the context in which it serves.
Served = dict[str, tuple[Any, Callable[[], AbstractContextManager]]]


@dataclass(frozen=True)
class Check:
    """A question that verify answered, and the evidence."""

    name: str
    passed: bool
    detail: str


@dataclass
class Comparison:
    """The difference between two models on the answers of one split.

    kl is a mean over tokens, prob_first and prob_second are means over questions.
    """

    questions: int = 0
    tokens: int = 0
    logits_max_diff: float = 0.0
    logits_max: float = 0.0
    kl: float = 0.0
    next_token_changes: int = 0
    prob_first: float = 0.0
    prob_second: float = 0.0

    def add(self, first: AnswerLogits, second: AnswerLogits) -> None:
        """Take in one answer."""
        seen = unmasked(first.logits) | unmasked(second.logits)
        difference = (first.logits - second.logits)[seen].abs().max().item()
        self.logits_max_diff = float(np.maximum(self.logits_max_diff, difference))  # keeps NaN
        largest = first.logits[unmasked(first.logits)].abs().max().item()
        self.logits_max = max(self.logits_max, largest)
        changed = first.predictions() != second.predictions()
        self.next_token_changes += int(changed.sum())
        self.tokens += len(changed)
        # Rounding can take a KL of zero below it.
        kl_sum = max(second.kl(first).sum().item(), 0.0)
        self.kl += (kl_sum - self.kl * len(changed)) / self.tokens
        self.questions += 1
        self.prob_first += (_probability(first) - self.prob_first) / self.questions
        self.prob_second += (_probability(second) - self.prob_second) / self.questions


def _probability(answer: AnswerLogits) -> float:
    return answer.nll().mean().neg().exp().item()


@dataclass
class VerifyReport:
    """Findings of verify.

    Attributes:
        checks: in the order in which they were made; the first that failed may be the last.
        comparisons: (pair such as "base → adapter", split) -> the difference.
        sizes: split -> how many questions it has, of which comparisons may have the first ones.
        answers: questions with the answers of every model.
    """

    checks: list[Check] = field(default_factory=list)
    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def ask(self, name: str, question: Callable[..., str], *args: Any) -> bool:
        """Add a check with the evidence that ``question`` returns, or its ValueError as failure."""
        try:
            self.checks.append(Check(name, True, question(*args)))
        except ValueError as error:
            self.checks.append(Check(name, False, str(error)))
        return self.checks[-1].passed

    def text(self) -> str:
        """The report for a terminal."""
        lines = [
            f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}"
            for check in self.checks
        ]
        if self.comparisons:
            titles = (
                *("compared", "split", "questions"),
                *("max |Δlogit|", "KL, nats", "next token changed", "p(answer)"),
            )
            rows = [
                (
                    *(pair, split),
                    self._of_split(split, row.questions),
                    f"{row.logits_max_diff:.4g}",
                    f"{row.kl:.3g}",
                    f"{row.next_token_changes} of {row.tokens}",
                    f"{row.prob_first:.3g} → {row.prob_second:.3g}",
                )
                for (pair, split), row in self.comparisons.items()
            ]
            lines += ["", *align_columns([titles, *rows])]
        for answer in self.answers:
            lines += ["", f"[{answer['split']}] {answer['question']}"]
            shown = {k: v for k, v in answer.items() if k not in ("split", "question")}
            lines += [f"  {name:8s} {text}" for name, text in shown.items()]
        failed = [check.name for check in self.checks if not check.passed]
        verdict = f"VERIFY FAILED: {', '.join(failed) or 'nothing was checked'}"
        return "\n".join([*lines, "", "verify passed" if self.passed else verdict])

    def _of_split(self, split: str, compared: int) -> str:
        size = self.sizes.get(split, compared)
        return f"first {compared} of {size}" if compared < size else f"all {size}"


def verify(
    base: str | Path | PreTrainedModel,
    adapter_dir: str | Path,
    merged_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[QA],
    retain: Sequence[QA],
    *,
    max_questions: int = 16,
    show_answers: int = 3,
    max_new_tokens: int = 48,
    max_length: int = 512,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Compare base, base + adapter as peft serves it, and merged model on both sets of questions.

    The adapter goes through ``PeftModel.from_pretrained`` alone, so what is checked is what others
    will serve. Logits are compared on the tokens of the known answers.

    Args:
        base: folder or hub name of the base model, or the model itself (given back unchanged).
        adapter_dir: folder in PEFT's format.
        merged_dir: folder of the merged model, or None.
        tokenizer: the base model's.
        forget, retain: questions with the answers to be forgotten and to be kept.
        max_questions: compared from each set, from its start.
        show_answers: greedy answers shown from each set.
        max_new_tokens: length limit of a shown answer.
        max_length: most tokens of a question with its answer.
        trust_remote_code: run code that comes with the models.

    Returns:
        The report. It fails, with the likely cause, when a file is damaged, the adapter was made
        for another base, peft does not load all of it, it changes nothing, the answers to be
        forgotten are no less probable, or the merged model is not base + adapter.

    Raises:
        ValueError: no forget or no retain questions.
    """
    from peft import PeftModel

    splits = {"forget": forget[:max_questions], "retain": retain[:max_questions]}
    for name, records in splits.items():
        if not records:
            raise ValueError(f"verify: {name} has no questions; give at least one.")
    report = VerifyReport(sizes={"forget": len(forget), "retain": len(retain)})
    folder = Path(adapter_dir)
    tensors: dict[str, Tensor] = {}
    if not report.ask("adapter files", _read_finite, folder, tensors):
        return report
    trusted = {"trust_remote_code": trust_remote_code}
    model = _load(base, **trusted) if isinstance(base, (str, Path)) else base
    with evaluating(model):
        if not report.ask("base model", _check_shapes, model, folder, tensors):
            return report
        if not report.ask("base weights", _check_weights, model, folder):
            return report
        held, touched = dict(model.named_parameters()), _touched(model, folder, tensors)
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        try:
            report.ask("peft load", _check_loaded, adapted, tensors)
            served: Served = {
                "base": (adapted, adapted.disable_adapter),
                "adapter": (adapted, nullcontext),
            }
            if merged_dir is not None:
                try:
                    served["merged"] = (_load_merged(merged_dir, model, **trusted), nullcontext)
                except ValueError as error:
                    report.checks.append(Check("merged model", False, str(error)))
            found = report.comparisons = _compare(served, tokenizer, splits, max_length)
            changed = found["base → adapter", "forget"]
            report.ask("adapter effect", _check_effect, changed, tensors)
            report.ask("forgotten answers less probable", _check_less, changed)
            if "merged" in served:
                eight_bit = any(type(m).__name__ == "Linear8bitLt" for m in model.modules())
                kind = torch.int8 if eight_bit else served["merged"][0].dtype
                if report.ask("merged model", _check_merged, found, kind):
                    weights = dict(served["merged"][0].named_parameters())
                    report.ask("rest of the merged model", _check_rest, weights, held, touched)
                    report.ask(
                        "merged model's tokenizer",
                        _check_tokenizer,
                        merged_dir,
                        tokenizer,
                        trust_remote_code,
                    )
            shown = {split: records[:show_answers] for split, records in splits.items()}
            report.answers = _answers(served, tokenizer, shown, max_new_tokens)
        finally:
            adapted.unload()
    return report


def _read_finite(folder: Path, tensors: dict[str, Tensor]) -> str:
    tensors.update(read_adapter(folder)[1])
    if not tensors:
        raise ValueError(f"{folder} holds no tensors; export the adapter again.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity, first {broken[0]}; "
            "train again."
        )
    return f"{len(tensors)} tensors in {folder}"


def _check_shapes(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]) -> str:
    modules = adaptable_layers(model)
    of_experts = adapted_names(read_json(folder / CONFIG), modules)
    problems = []
    for match in filter(None, map(_LORA_KEY.fullmatch, tensors)):
        name, side = of_experts.get(match[1], match[1]), match[2]
        axis = 1 if side == "A" else 0
        sizes = linear_sizes(modules[name])[::-1] if name in modules else (0, 0)
        if not all(sizes):
            problems.append(f"the base has no linear layer {name!r}")
        elif (made := tensors[match[0]].shape[axis]) != (has := sizes[axis]):
            problems.append(
                f"{name} has {('out', 'in')[axis]}_features {has} in the base, the adapter was "
                f"made for {made}"
            )
    if problems:
        raise ValueError(
            f"made for another base model: {problems[0]} ({len(problems)} mismatches)."
        )
    return f"names and shapes of {len(tensors)} tensors fit"


def _check_weights(model: PreTrainedModel, folder: Path) -> str:
    if check_fingerprint(model, folder / SIDECAR):
        return f"those that the adapter was trained on, by the fingerprint in {SIDECAR}"
    if (folder / SIDECAR).is_file():
        return f"not compared: {SIDECAR} has no fingerprint of those trained on"
    return f"not compared: there is no {SIDECAR} with a fingerprint of those trained on"


def _check_loaded(adapted: Any, tensors: Mapping[str, Tensor]) -> str:
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(adapted)
    lost = [
        name
        for name, tensor in tensors.items()
        if name not in loaded or not torch.equal(loaded[name].cpu().float(), tensor.float())
    ]
    if lost:
        raise ValueError(
            f"peft left out {len(lost)} of {len(tensors)} tensors, first {lost[0]}; "
            "check target_modules."
        )
    return f"peft serves all {len(tensors)} tensors"


def _compare(
    served: Served,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[QA]],
    max_length: int,
) -> dict[tuple[str, str], Comparison]:
    """Compare pairs of models question by question, so that only one question's logits are held."""
    pairs = [("base", "adapter")]
    if "merged" in served:
        pairs += [("adapter", "merged"), ("base", "merged")]
    found = {(f"{a} → {b}", split): Comparison() for a, b in pairs for split in splits}
    for split, records in splits.items():
        for qa in records:
            encoded = encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length)
            batch = collate([encoded], pad_token_id(tokenizer))
            answers = {}
            for name, (model, serving) in served.items():
                with serving():
                    states = answer_logits(model, {k: v.to(model.device) for k, v in batch.items()})
                answers[name] = replace(states, logits=states.logits.double())
            for a, b in pairs:
                found[f"{a} → {b}", split].add(answers[a], answers[b])
    return found


def _check_effect(forget: Comparison, tensors: Mapping[str, Tensor]) -> str:
    """The adapter must change the model."""
    detail = (
        f"KL {forget.kl:.3g} nats a token, logits differ by up to {forget.logits_max_diff:.3g} "
        "on forget answers"
    )
    if forget.kl > NO_EFFECT_KL:
        return detail
    up = [tensor for name, tensor in tensors.items() if ".lora_B." in name]
    cause = (
        "every lora_B is zero: it was saved before training, or never trained"
        if up and not any(tensor.any() for tensor in up)
        else "its update is zero or vanishingly small: check lora_alpha, and that the base is "
        "not already merged"
    )
    raise ValueError(f"the adapter does nothing on the forget questions ({detail}); {cause}.")


def _check_less(forget: Comparison) -> str:
    """The answers to be forgotten must be less probable."""
    detail = f"mean probability {forget.prob_first:.3g} → {forget.prob_second:.3g}"
    if forget.prob_second < forget.prob_first:
        return detail
    raise ValueError(
        f"{detail}; nothing was unlearned. Is this the forget set that the adapter was trained on?"
    )


def _check_merged(found: Mapping[tuple[str, str], Comparison], dtype: torch.dtype) -> str:
    """The merged model must be base + adapter up to the rounding of its dtype."""
    both = [found["adapter → merged", split] for split in ("forget", "retain")]
    difference = float(np.max([c.logits_max_diff for c in both]))
    tolerance = MERGE_TOLERANCE.get(dtype, MERGE_TOLERANCE[torch.bfloat16])
    allowed = tolerance * max(c.logits_max for c in both)
    moved = found["base → adapter", "forget"].kl
    drift = both[0].kl
    detail = (
        f"logits differ by up to {difference:.3g} (allowed {allowed:.3g} in "
        f"{str(dtype).removeprefix('torch.')}), KL {fmean(c.kl for c in both):.3g} nats a token"
    )
    if found["base → merged", "forget"].kl <= NO_EFFECT_KL < moved:
        raise ValueError(
            f"the merged model is the base model: the adapter was never merged into it. {detail}"
        )
    if not difference <= allowed:
        raise ValueError(
            "the merged model is not base + adapter: was it merged from another adapter, twice, "
            f"or quantised? {detail}"
        )
    if not drift <= MERGE_KL_SHARE * moved:
        raise ValueError(
            f"rounding undid part of the unlearning (KL {drift:.3g} of {moved:.3g}); "
            f"merge in a wider dtype. {detail}"
        )
    return detail


def _touched(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """The modules, and parameters of experts, that the adapter's tensors belong to."""
    of_experts = adapted_names(read_json(folder / CONFIG), adaptable_layers(model))
    names = (match[1] for match in filter(None, map(_LORA_KEY.fullmatch, tensors)))
    return {of_experts.get(name, name) for name in names}


def _check_rest(
    merged: Mapping[str, Tensor], base: Mapping[str, Tensor], touched: Collection[str]
) -> str:
    """Tensors that no adapter touches have to be the base's own, even where no question tells."""
    count = 0
    for name, weight in base.items():
        other = merged.get(name)
        adapted = name in touched or name.rpartition(".")[0] in touched
        if adapted or other is None or type(weight) is not torch.nn.Parameter:
            continue  # a quantised weight, say, which a merge makes plain
        if not torch.equal(weight.to(other.dtype), other):
            raise ValueError(f"{name} is not the base's, and no adapter is on it; merge again.")
        count += 1
    return f"{count} weights without an adapter are the base's, to the last bit"


def _check_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerBase, trusted: bool) -> str:
    from transformers import AutoTokenizer

    if not Path(folder, "tokenizer_config.json").is_file():
        return f"{folder} has none; serve it with the base's"
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # a damaged file raises anything in transformers
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({error}); merge again."
        ) from error
    for what in ("get_vocab", "chat_template", "eos_token"):
        ours, theirs = (getattr(one, what, None) for one in (own, tokenizer))
        if (ours() if callable(ours) else ours) != (theirs() if callable(theirs) else theirs):
            raise ValueError(f"{folder}: {what} is not that of the base's tokenizer; merge again.")
    return "vocabulary, chat template and end token are the base's"


def _load(path: str | Path, **trusted: bool) -> PreTrainedModel:
    return load_language_model(path, dtype="auto", **trusted).eval()


def _load_merged(folder: str | Path, base: PreTrainedModel, **trusted: bool) -> PreTrainedModel:
    try:
        merged = _load(folder, **trusted)
    except Exception as error:  # a damaged file raises anything in transformers
        raise ValueError(f"{folder} cannot be loaded ({error}); merge again.") from error
    has, wanted = (model.get_output_embeddings().weight.shape[0] for model in (merged, base))
    if has != wanted:
        raise ValueError(f"vocabulary of {has}, the base has {wanted}: merged from another base.")
    return merged.to(base.device)


def _answers(
    served: Served,
    tokenizer: PreTrainedTokenizerBase,
    shown: Mapping[str, Sequence[QA]],
    max_new_tokens: int,
) -> list[dict[str, str]]:
    """Greedy answers of every model, beside question and expected answer."""
    rows = [
        {"split": split, "question": qa.question, "expected": qa.answer}
        for split, records in shown.items()
        for qa in records
    ]
    questions = [row["question"] for row in rows]
    for name, (model, serving) in served.items():
        with serving():
            texts = greedy_answers(model, tokenizer, questions, max_new_tokens=max_new_tokens)
        for row, text in zip(rows, texts, strict=True):
            row[name] = text
    return rows
