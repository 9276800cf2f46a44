"""Attacks on a finished run: what it forgot, relearnt, after quantising, or asked otherwise."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_kernels.checks import check_range
from nsru_kernels.files import read_json, whole_folder
from nsru_kernels.hf.peft_format import CONFIG, SIDECAR, load_lora_adapter
from nsru_kernels.text_table import align_columns
from nsru_train.answering import greedy_answers
from nsru_train.callbacks import GradientError
from nsru_train.config import LoraConfig
from nsru_train.data.records import QA
from nsru_train.evaluation import evaluate, probability_sets, spread
from nsru_train.language_models import load_language_model
from nsru_train.loading import load_model
from nsru_train.losses.batch import FORGET, Batch
from nsru_train.methods.method import Method, mean
from nsru_train.metrics.robustness import relearning_robustness, stability
from nsru_train.metrics.text import has_words, rouge_l_recall
from nsru_train.metrics.tofu import harmonic_mean
from nsru_train.pipeline import unlearn
from nsru_train.quantized import bits_config, dense_experts, dequantize
from nsru_train.repair import QUESTIONS, FinishedRun
from nsru_train.report import tables
from nsru_train.run_config import adapter_digest, check_same_run
from nsru_train.run_folder import RunFolder

logger = logging.getLogger(__name__)

ATTACKS = ("relearn", "quantise", "paraphrase", "prefix", "tokens", "sample")
# Form of the weights -> the package that quantises to it.
QUANTISED = {"int8": "bitsandbytes", "NF4": "bitsandbytes", "int4": "torchao"}
OPENING = "Sure, here is the answer:"
LONGER = 4  # times as many new tokens
OWN, RETAIN = "unlearned", "retain model"
NONE, NEW, AGAIN = "none", "relearned", "relearned in its own LoRA"
KNOWN = ("probability", "rougeL_recall", "extraction_strength", "exact_memorisation")
# What is known after an attack, and at the steps of the way there.
Found = tuple[dict[str, float], list[dict[str, float]]]


@dataclass(frozen=True)
class AttackSettings:
    """See ``nsru attack --help``. Raises ValueError for one out of its range."""

    attacks: Sequence[str] = ATTACKS
    steps: int = 100
    lr: float | None = None
    share: float = 1.0
    samples: int = 8
    max_new_tokens: int = 64
    retain_model: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        odd = [name for name in self.attacks if name not in ATTACKS]
        if odd or not self.attacks:
            got = odd[0] if odd else "none"
            raise ValueError(f"attacks: expected some of {', '.join(ATTACKS)}, got {got}.")
        for name in ("steps", "samples", "max_new_tokens"):
            check_range(name, getattr(self, name), "must be ≥ 1", whole=True)
        check_range("share", self.share, "must be a share above 0 and at most 1")
        check_range("seed", self.seed, "must be from 0 to 2³² - 1", whole=True)
        if self.lr is not None:
            check_range("lr", self.lr, "must be positive")


@dataclass(frozen=True)
class Relearn(Method):
    """Mean NLL of the forget answers' tokens, which goes down again: what an attacker trains."""

    rows = (FORGET,)
    parts = ("relearn",)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        relearn = mean(batch[FORGET].nll)
        return {"relearn": relearn, "total": relearn}


def attack(path: str, out: str, settings: AttackSettings, *, resume: bool = False) -> None:
    """Attack a run, and a model trained on the retain data alone beside it.

    Every finished attack is kept in ``out``, from where ``resume`` goes on.

    Raises:
        ValueError: a retain model with another tokenizer, or as `FinishedRun`.
    """
    run = FinishedRun(path, out)
    models = {OWN: str(run.folder.path / "merged")}
    if settings.retain_model is not None:
        models[RETAIN] = settings.retain_model
        _, tokenizer = load_model(replace(run.sections["model"], path=settings.retain_model))
        if tokenizer.get_vocab() != run.tokenizer.get_vocab():
            raise ValueError(
                f"retain_model: {settings.retain_model} has another tokenizer than the run's "
                "model; give one that was trained from the same base model."
            )
    asked = {
        "attack": {**asdict(settings), "attacks": list(settings.attacks)},
        "run": {"adapter": adapter_digest(run.adapter), "sets": run.data.digests()},
    }
    if resume:
        check_same_run(run.folder.config_path, asked)
    else:
        shutil.rmtree(run.folder.path / "attacks", ignore_errors=True)
    run.folder.write_config(asked)
    base: Any = run.base()
    before = run.probe(base)
    attacker = Attacker(run, settings, models, base)
    load_lora_adapter(base, run.adapter)
    nk.merge_adapters(base)
    if getattr(base, "hf_quantizer", None) is not None:
        dequantize(base)
    with whole_folder(models[OWN]) as folder:
        base.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
    del base
    try:
        found = [one for name in models for one in attacker.attack(name)]
    finally:
        shutil.rmtree(models[OWN])
    rows = [one["row"] for one in found]
    overall = add_robustness(rows)
    if "robustness" not in overall:
        attacker.notes.append(
            "robustness: needs a quantisation, and relearning with --retain_model, a model trained "
            "on the retain data only."
        )
    for note in attacker.notes:
        logger.warning("%s", note)
    shown = [{"method": "before", **before}]
    for row in rows:
        if "retain_prob" in row and (row["model"] == OWN or row["attack"] not in QUANTISED):
            shown.append({"method": row["name"], **row})
    shown[1] |= overall
    table = tables.attacks(rows)
    print("\n".join(align_columns([table.head, *table.rows])))
    print("\n".join(f"{name.replace('_', ' of ')}: {value:.4f}" for name, value in overall.items()))
    run.write(
        "attack",
        asked["attack"],
        [{"seed": settings.seed, **row} for row in shown],
        attacks=rows,
        notes=attacker.notes,
        frontier=[{"seed": settings.seed, **point} for one in found for point in one["points"]],
    )


class Attacker:
    """Attacks on a finished run and a retain model, each kept in a folder of its own.

    Args:
        models: name -> folder of `OWN`, the run's adapter merged, and `RETAIN`, if given.
        base: of the run, whose dtype and device the others get.
    """

    def __init__(
        self, run: FinishedRun, settings: AttackSettings, models: dict[str, str], base: nn.Module
    ) -> None:
        self.run, self.settings, self.models = run, settings, models
        weight: Tensor = next(base.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        passed_by = dense_experts(base) if "quantise" in settings.attacks else ""
        self.notes = [f"quantise: {passed_by}"] if passed_by else []
        forget = run.data.forget
        self.asked = spread(forget, QUESTIONS)
        self.taught = list(spread(forget, max(1, round(settings.share * len(forget)))))
        sets = {"forget": forget, "forget_rest": [qa for qa in forget if qa not in self.taught]}
        self.curve = probability_sets(
            run.tokenizer, {name: found for name, found in sets.items() if found}, run.data.safe,
            max_length=run.max_length, limit=QUESTIONS,
        )  # fmt: skip

    def attack(self, victim: str) -> Iterator[dict[str, Any]]:
        """Row of each attack on a model, and the way there; what is there already is kept."""
        for name, way in self.ways(victim):
            label = victim if name == NONE else name if victim == OWN else f"{victim}, {name}"
            place = "-".join(label.replace(",", "").split())
            folder = RunFolder(self.run.folder.path / "attacks" / place)
            if not folder.results_path.exists():
                print(f"{label} …")
                try:
                    known, points = way()
                except (ValueError, GradientError) as error:
                    if name == NONE:
                        raise
                    self.notes.append(f"{label}: left out, {error}")
                    continue
                row = {"name": label, "attack": name, "model": victim, **known}
                path = [{"method": label, **point} for point in points]
                folder.write_results({"row": row, "points": path})
            yield folder.read_results(row=dict, points=list[dict])

    def ways(self, victim: str) -> Iterator[tuple[str, Callable[[], Found]]]:
        """Name of each attack on a model, and what carries it out; to be called in turn."""
        run, asked, sections = self.run, self.settings, self.run.sections
        loaded: list[nn.Module] = []

        def plain() -> nn.Module:  # once for all attacks that leave it as it is
            loaded[:] = loaded or [self.load(victim)]
            return loaded[0]

        longer = LONGER * asked.max_new_tokens
        yield NONE, lambda: (self.changed(plain()), [])
        if "paraphrase" in asked.attacks:
            yield "paraphrase", lambda: (self.known(plain(), reworded(self.asked)), [])
        if "prefix" in asked.attacks:
            yield "prefix", lambda: (self.said(plain(), opening=OPENING), [])
        if "tokens" in asked.attacks:
            yield f"{longer} tokens", lambda: (self.said(plain(), max_new_tokens=longer), [])
        if "sample" in asked.attacks:
            count = asked.samples
            yield f"best of {count}", lambda: (self.said(plain(), count, sample=True), [])
        loaded.clear()
        for form in QUANTISED if "quantise" in asked.attacks else ():
            yield form, partial(self.squeezed, victim, form)
        if "relearn" in asked.attacks:
            folder = run.folder.path / "runs" / victim.replace(" ", "-")
            layers, lora = sections["subspace"], replace(sections["lora"], project=False)
            yield (
                NEW,
                lambda: self.relearn(
                    self.load(victim), folder, lora, layers.targets, exclude=layers.exclude
                ),
            )
        if "relearn" in asked.attacks and victim == OWN:
            saved = read_json(Path(run.adapter) / CONFIG)
            alphas = read_json(Path(run.adapter) / SIDECAR).get("alphas") or saved["alpha_pattern"]
            ranks = saved["rank_pattern"]
            own = LoraConfig(saved["r"], saved["lora_alpha"], ranks, alphas, project=False)
            targets = [*saved["target_modules"], *saved.get("target_parameters", ())]
            yield (
                AGAIN,
                lambda: self.relearn(run.base(), folder / "own", own, targets, adapter=run.adapter),
            )

    def load(self, victim: str) -> nn.Module:
        plain = {"path": self.models[victim], "quantize": "none"}
        return load_model(replace(self.run.sections["model"], **plain))[0]

    def squeezed(self, victim: str, form: str) -> Found:
        model = self.quantised(victim, form)
        try:
            return self.changed(model), []
        except Exception as error:  # of any package, for layers that it does not expect
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{QUANTISED[form]} cannot serve it: {reason:.200}") from error

    def quantised(self, victim: str, form: str) -> nn.Module:
        """The model with the weights of its linears in ``form``, one of `QUANTISED`.

        Raises:
            ValueError: the package is not installed, or cannot do it here.
        """
        package = QUANTISED[form]
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package}")
        from transformers import TorchAoConfig

        logging.getLogger(package).setLevel(logging.ERROR)  # which warns at each product
        try:
            if form == "int4":
                from torchao.quantization import IntxWeightOnlyConfig
                from torchao.quantization.granularity import PerGroup

                int4 = getattr(torch, "int4")  # noqa: B009, which torch's stubs lack
                how: Any = TorchAoConfig(IntxWeightOnlyConfig(int4, PerGroup(32)))
            else:
                how = bits_config(form.lower(), self.dtype)
            return load_language_model(
                self.models[victim],
                dtype=self.dtype,
                quantization_config=how,
                device_map={"": self.device},
                trust_remote_code=self.run.sections["model"].trust_remote_code,
            ).eval()
        except Exception as error:  # what a package does not do here, it says in its own way
            raise ValueError(f"{package} cannot quantise it: {str(error)[:200]}") from error

    def known(self, model: nn.Module, asked: Sequence[QA]) -> dict[str, float]:
        """A model's knowledge of the forget set, asked by these records."""
        found = evaluate(
            model,
            self.run.tokenizer,
            {"forget": asked},
            max_length=self.run.max_length,
            max_new_tokens=self.settings.max_new_tokens,
        ).metrics["forget"]
        known = {f"forget_{name}": found[name] for name in KNOWN if name in found}
        return {"forget_prob": known.pop("forget_probability"), **known}

    def changed(self, model: nn.Module) -> dict[str, float]:
        """The same of another model, asked as it is, and probabilities of answers of all sets."""
        return {**self.run.probe(model), **self.known(model, self.asked)}

    def said(self, model: nn.Module, times: int = 1, **options: Any) -> dict[str, float]:
        """Mean ROUGE-L recall of generated answers, the best of several to each question."""
        records = [qa for qa in self.asked if has_words(qa.answer)]
        options = {"max_new_tokens": self.settings.max_new_tokens, "progress": True, **options}
        best = [0.0] * len(records)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            for _ in range(times):
                questions = [qa.question for qa in records]
                answers = greedy_answers(model, self.run.tokenizer, questions, **options)
                recalls = map(rouge_l_recall, (qa.answer for qa in records), answers)
                best = list(map(max, best, recalls))
        return {"forget_rougeL_recall": fmean(best)} if best else {}

    def relearn(
        self, model: nn.Module, folder: Path, lora: LoraConfig, targets: Any, **options: Any
    ) -> Found:
        """Train on forget answers alone; what is known then, and the way there."""
        run, asked, train = self.run, self.settings, self.run.sections["train"]

        def probe(step: int, model: nn.Module) -> dict[str, float]:
            return run.probe(model, self.curve)

        outcome = unlearn(
            model,
            run.tokenizer,
            replace(run.data, forget=self.taught),
            folder,
            targets=targets,
            subspaces=None,
            lora=lora,
            objective=Relearn(),
            train=replace(
                train, steps=asked.steps, lr=asked.lr or train.lr, seed=asked.seed, save_steps=0,
                lr_scheduler_type="constant", lr_scheduler_kwargs={}, warmup=0.0, weight_decay=0.0,
                report_to=[],
            ),
            max_length=run.max_length,
            on_eval=probe,
            eval_steps=max(1, asked.steps // 10),
            **options,
        )  # fmt: skip
        return {**outcome.evaluations[-1], **self.changed(model)}, outcome.evaluations


def reworded(records: Sequence[QA]) -> list[QA]:
    """The records with their paraphrased questions. Raises ValueError where one has none."""
    if lacking := sum(qa.paraphrased_question is None for qa in records):
        raise ValueError(f"{lacking} of {len(records)} forget records have no paraphrased_question")
    return [replace(qa, question=qa.paraphrased_question or "") for qa in records]


def add_robustness(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Give each attack's row its "robustness", by p(answer) or else ROUGE-L.

    Returns:
        robustness_relearning, robustness_quantisation and robustness_asking, each the least of
        such attacks on the run, and robustness, the harmonic mean of the first two; those that
        could be computed.
    """
    by = {(row["model"], row["attack"]): row for row in rows}
    least: dict[str, float] = {}
    for (model, name), row in by.items():
        key = "forget_prob" if "forget_prob" in row else "forget_rougeL_recall"
        before, kind = by[model, NONE].get(key), "asking"
        if name == NONE or before is None:
            continue
        if name in (NEW, AGAIN):
            kind, retain = "relearning", by.get((RETAIN, NEW))
            if retain is None or model == RETAIN:
                continue
            start = by[RETAIN, NONE][key]
            row["robustness"] = relearning_robustness(before, row[key], start, retain[key])
        else:
            kind = "quantisation" if name in QUANTISED else kind
            row["robustness"] = stability(before, row[key])
        if model == OWN:
            kind = f"robustness_{kind}"
            least[kind] = min(row["robustness"], least.get(kind, 1.0))
    both = [least.get(f"robustness_{kind}") for kind in ("relearning", "quantisation")]
    found = [value for value in both if value is not None]
    return least | ({"robustness": harmonic_mean(found)} if len(found) == 2 else {})
