"""Is an exported adapter applied? Base, adapter (through peft alone) and merged model compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsru_kernels.hf.peft_format import read_adapter
from nsru_train.data.encode import Encoded, encode_prompt, encode_qa
from nsru_train.data.records import QA
from nsru_train.verify_report import Check, Comparison, VerifyReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Mean KL(base ‖ adapter) in nats a token below which an adapter counts as doing nothing. Two
# orders of summation in the same fp32 model differ by about 1e-12.
NO_EFFECT_KL = 1e-6
# Largest logit difference between adapter and merged model, relative to the largest logit, by dtype
# of the merged weights: their rounding, carried through the layers.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A merge may move the forget answers by at most this share of what the adapter moved them.
MERGE_KL_SHARE = 0.1

_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
Model = Callable[[Tensor], Tensor]


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

    Returns:
        The report. It fails, with the likely cause, when a file is damaged, the adapter was made
        for another base, peft does not load all of it, it changes nothing, the answers to be
        forgotten are no less probable, or the merged model is not base + adapter.

    Raises:
        ValueError: no forget or no retain questions.
    """
    for name, records in (("forget", forget), ("retain", retain)):
        if not records:
            raise ValueError(f"verify: {name} has no questions; give at least one.")
    report = VerifyReport()
    tensors = _check_files(report, Path(adapter_dir))
    if tensors is None:
        return report
    model = _load(base) if isinstance(base, (str, Path)) else base
    was_training = model.training
    model.eval()
    try:
        if _check_base(report, model, Path(adapter_dir), tensors):
            _compare(
                report, model, Path(adapter_dir), merged_dir, tensors, tokenizer,
                {"forget": forget[:max_questions], "retain": retain[:max_questions]},
                show_answers, max_new_tokens, max_length,
            )  # fmt: skip
    finally:
        model.train(was_training)
    return report


def _check_files(report: VerifyReport, folder: Path) -> dict[str, Tensor] | None:
    """The adapter's tensors, None when the files cannot be used."""
    try:
        _, tensors = read_adapter(folder)
    except ValueError as error:
        report.checks.append(Check("adapter files", False, str(error)))
        return None
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    detail = f"{len(tensors)} tensors in {folder}"
    if broken:
        detail = (
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity, first {broken[0]}; "
            "train again."
        )
    if not tensors:
        detail = f"{folder} holds no tensors; export the adapter again."
    report.checks.append(Check("adapter files", bool(tensors) and not broken, detail))
    return tensors if report.passed else None


def _check_base(
    report: VerifyReport, model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]
) -> bool:
    """Is the adapter made for this model: modules by name and shape, weights by fingerprint."""
    transposed = json.loads((folder / "adapter_config.json").read_text()).get("fan_in_fan_out")
    modules = dict(model.named_modules())
    problems = []
    for key, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        if not match:
            continue
        name, side = match.groups()
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            problems.append(f"the base has no layer {name!r}")
            continue
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        expected, got, what = (
            (in_features, tensor.shape[1], "in_features")
            if side == "A"
            else (out_features, tensor.shape[0], "out_features")
        )
        if expected != got:
            problems.append(
                f"{name} has {what} {expected} in the base, the adapter was made for {got}"
            )
    detail = f"names and shapes of {len(tensors)} tensors fit"
    if problems:
        detail = f"made for another base model: {problems[0]} ({len(problems)} mismatches)."
    report.checks.append(Check("base model", not problems, detail))
    if not problems:
        _check_fingerprint(report, model, folder)
    return report.passed


def _check_fingerprint(report: VerifyReport, model: PreTrainedModel, folder: Path) -> None:
    sidecar = folder / "nsru.json"
    try:
        wanted = json.loads(sidecar.read_text()).get("fingerprint") if sidecar.exists() else None
    except (ValueError, AttributeError) as error:
        report.checks.append(
            Check("base weights", False, f"{sidecar} is damaged ({error}); export again.")
        )
        return
    if wanted is None:
        return
    from nsru_kernels.subspaces.collection import fingerprint_weights

    found = fingerprint_weights(model)
    detail = f"fingerprint {found:.12}"
    if found != wanted:
        detail = (
            f"the adapter was trained on weights with fingerprint {wanted:.12}, this base has "
            f"{found:.12}; its retain subspaces do not hold here."
        )
    report.checks.append(Check("base weights", found == wanted, detail))


def _compare(
    report: VerifyReport,
    model: PreTrainedModel,
    folder: Path,
    merged_dir: str | Path | None,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[QA]],
    show_answers: int,
    max_new_tokens: int,
    max_length: int,
) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    try:
        loaded = get_peft_model_state_dict(adapted)
        lost = [
            name
            for name, tensor in tensors.items()
            if name not in loaded or not torch.equal(loaded[name].cpu().float(), tensor.float())
        ]
        detail = f"peft serves all {len(tensors)} tensors"
        if lost:
            detail = (
                f"peft left out {len(lost)} of {len(tensors)} tensors, first {lost[0]}; "
                "check target_modules."
            )
        report.checks.append(Check("peft load", not lost, detail))

        def base_logits(ids: Tensor) -> Tensor:
            with adapted.disable_adapter():
                return adapted(input_ids=ids, use_cache=False).logits

        def base_answer(question: str) -> str:
            with adapted.disable_adapter():
                return _answer(adapted, tokenizer, question, max_new_tokens)

        models: dict[str, Model] = {
            "base": base_logits,
            "adapter": lambda ids: adapted(input_ids=ids, use_cache=False).logits,
        }
        answer = {
            "base": base_answer,
            "adapter": lambda q: _answer(adapted, tokenizer, q, max_new_tokens),
        }
        merged = _load_merged(report, merged_dir, model) if merged_dir is not None else None
        if merged is not None:
            models["merged"] = lambda ids: merged(input_ids=ids, use_cache=False).logits
            answer["merged"] = lambda q: _answer(merged, tokenizer, q, max_new_tokens)

        encoded = {
            split: [
                encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length)
                for qa in records
            ]
            for split, records in splits.items()
        }
        found = _run(models, encoded, model.device)
        report.comparisons += found.values()
        _check_effect(report, found["base → adapter", "forget"], tensors)
        if merged is not None:
            _check_merged(report, found, merged.dtype)
        for split, records in splits.items():
            report.answers += [
                {"split": split, "question": qa.question, "expected": qa.answer}
                | {name: generate(qa.question) for name, generate in answer.items()}
                for qa in records[:show_answers]
            ]
    finally:
        adapted.unload()


@torch.inference_mode()
def _run(
    models: Mapping[str, Model], encoded: Mapping[str, Sequence[Encoded]], device: torch.device
) -> dict[tuple[str, str], Comparison]:
    """Compare pairs of models question by question, so that only one question's logits are held."""
    pairs = [("base", "adapter")]
    if "merged" in models:
        pairs += [("adapter", "merged"), ("base", "merged")]
    found = {
        (f"{a} → {b}", split): Comparison(f"{a} → {b}", split)
        for a, b in pairs
        for split in encoded
    }
    for split, items in encoded.items():
        for item in items:
            ids = torch.tensor([item.input_ids], device=device)
            answer = slice(item.answer_start - 1, len(item.input_ids) - 1)
            logits = {name: run(ids)[0, answer] for name, run in models.items()}
            targets = ids[0, item.answer_start :]
            for a, b in pairs:
                found[f"{a} → {b}", split].add(logits[a], logits[b], targets)
    return found


def _check_effect(report: VerifyReport, forget: Comparison, tensors: Mapping[str, Tensor]) -> None:
    """The adapter must change the model and make the answers to be forgotten less probable."""
    detail = (
        f"KL {forget.kl:.3g} nats a token, logits differ by up to {forget.logits_max_diff:.3g} "
        "on forget answers"
    )
    works = forget.kl > NO_EFFECT_KL
    if not works:
        up = [tensor for name, tensor in tensors.items() if ".lora_B." in name]
        cause = (
            "every lora_B is zero: it was saved before training, or never trained"
            if up and not any(tensor.any() for tensor in up)
            else "its update is zero or vanishingly small: check lora_alpha, and that the base is "
            "not already merged"
        )
        detail = f"the adapter does nothing on the forget questions ({detail}); {cause}."
    report.checks.append(Check("adapter effect", works, detail))
    lower = forget.prob_second < forget.prob_first
    detail = f"mean probability {forget.prob_first:.3g} → {forget.prob_second:.3g}"
    if not lower:
        detail += "; nothing was unlearned. Is this the forget set that the adapter was trained on?"
    report.checks.append(Check("forgotten answers less probable", lower, detail))


def _check_merged(
    report: VerifyReport, found: Mapping[tuple[str, str], Comparison], dtype: torch.dtype
) -> None:
    """The merged model must be base + adapter up to the rounding of its dtype."""
    both = [found["adapter → merged", split] for split in ("forget", "retain")]
    difference = max(c.logits_max_diff for c in both)
    allowed = MERGE_TOLERANCE.get(dtype, MERGE_TOLERANCE[torch.bfloat16]) * max(
        c.logits_max for c in both
    )
    moved = found["base → adapter", "forget"].kl
    drift = both[0].kl
    detail = (
        f"logits differ by up to {difference:.3g} (allowed {allowed:.3g} in "
        f"{str(dtype).removeprefix('torch.')}), KL {fmean(c.kl for c in both):.3g} nats a token"
    )
    problem = ""
    if found["base → merged", "forget"].kl <= NO_EFFECT_KL < moved:
        problem = "the merged model is the base model: the adapter was never merged into it. "
    elif difference > allowed:
        problem = (
            "the merged model is not base + adapter: was it merged from another adapter, twice, "
            "or quantised? "
        )
    elif drift > MERGE_KL_SHARE * moved:
        problem = (
            f"rounding undid part of the unlearning (KL {drift:.3g} of {moved:.3g}); "
            "merge in a wider dtype. "
        )
    report.checks.append(Check("merged model", not problem, problem + detail))


def _load(path: str | Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def _load_merged(
    report: VerifyReport, folder: str | Path, base: PreTrainedModel
) -> PreTrainedModel | None:
    from safetensors import SafetensorError

    try:
        merged = _load(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        report.checks.append(
            Check("merged model", False, f"{folder} cannot be loaded ({error}); merge again.")
        )
        return None
    vocabularies = [model.get_output_embeddings().weight.shape[0] for model in (base, merged)]
    if vocabularies[0] != vocabularies[1]:
        detail = (
            f"vocabulary of {vocabularies[1]}, the base has {vocabularies[0]}: "
            "merged from another base."
        )
        report.checks.append(Check("merged model", False, detail))
        return None
    return merged.to(base.device)


@torch.inference_mode()
def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int
) -> str:
    prompt = torch.tensor([encode_prompt(tokenizer, question)], device=model.device)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
