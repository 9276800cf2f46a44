"""``nsru eval``: every metric of a run's model, of its base, or of any other, with its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

import nsru_kernels as nk
from nsru_kernels.checks import check_range
from nsru_kernels.files import atomic_write
from nsru_train.adapters import is_plain, load_adapter
from nsru_train.config import DataConfig, ModelConfig
from nsru_train.data.encode import prompt_text
from nsru_train.evaluation import (
    Evaluation,
    add_base_answers,
    evaluate,
    format_table,
    to_results,
)
from nsru_train.harness import Tasks, TaskSettings
from nsru_train.language_models import refuse_encoder_decoder
from nsru_train.loading import Data, load_data, load_model, without_long
from nsru_train.membership import add_attack_scores
from nsru_train.metrics import open_unlearning
from nsru_train.metrics.tofu import Log, check_retain_log, load_log, load_reference
from nsru_train.muse import Muse
from nsru_train.ordinary import refused_elsewhere
from nsru_train.report import write_report
from nsru_train.run_config import (
    folder_of,
    run_sections,
    say_changed_adapter,
    say_changed_sets,
)
from nsru_train.run_folder import RunFolder, to_json
from nsru_train.shares import launched
from nsru_train.sources import digest


@dataclass(frozen=True)
class RetainLog:
    """Numbers of a model trained on the retain data alone.

    Attributes:
        path: as it was given; None where nothing was.
        ours: TOFU's columns, where the evaluation writes our format.
        theirs: OpenUnlearning's metrics, where it writes theirs.
        auc: membership_auc, where it was measured.
        setup: of `_setup`, where our results say it.
    """

    path: str | None = None
    ours: Log | None = None
    theirs: dict[str, Any] | None = None
    auc: float | None = None
    setup: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | None, *, theirs: bool) -> RetainLog:
        if path is None:
            return cls()
        if not theirs:
            log = load_log(path)
            auc, setup = load_reference(path)
            return cls(path, ours=log, auc=auc, setup=setup)
        log = open_unlearning.read_log(path)
        auc = open_unlearning.attack_auc(log, "min_k") if "mia_min_k" in log else None
        return cls(path, theirs=log, auc=auc)

    def notes(self, setup: Mapping[str, Any]) -> Iterator[str]:
        """A line on each way in which its model was asked otherwise than by ``setup``."""
        tofus = self.ours is not None and not self.setup
        if tofus or (self.theirs is not None and not open_unlearning.texts(self.theirs, "forget")):
            yield (
                "retain_log: it does not say its questions; only their number was compared, so "
                "make sure that they are these"
            )
        if self.setup.get("compared", setup["compared"]) != setup["compared"]:
            yield (
                "retain_log: it was made with other paraphrases or wrong answers of the same "
                "questions: truth ratios and forget_quality compare what is not alike"
            )
        if self.setup.get("prompt", setup["prompt"]) != setup["prompt"]:
            yield (
                f"retain_log: its model was asked by {self.setup['prompt']!r:.200}, this one by "
                f"{setup['prompt']!r:.200}"
            )

    def check(self, data: Data) -> None:
        """Raise ValueError where it lacks what is compared, or is of other questions."""
        forget, holdout = (
            [(qa.question, qa.answer) for qa in records]
            for records in (data.forget, data.more.get("holdout", ()))
        )
        ratios = all(qa.perturbed_answers for qa in data.forget)
        if self.path is not None and self.ours is not None:
            splits = {"forget": forget, "holdout": holdout}
            check_retain_log(self.path, {n: own for n, own in splits.items() if own}, ratios=ratios)
        if self.theirs is not None:
            open_unlearning.check_retain_log(
                self.theirs, forget, ratios=ratios, holdout=len(holdout)
            )


def _setup(data: Data, tokenizer: Any) -> dict[str, str]:
    """Data and prompt that an evaluation and that of a retain model have to have alike."""
    forget = (
        replace(qa, topic=None, domain=None, safe_target=None, alternatives=())
        for qa in data.forget
    )
    return {"compared": digest([*forget]), "prompt": prompt_text(tokenizer, "{}")}


def run_eval(
    run: str,
    out: str | None,
    *,
    model: ModelConfig | None,
    data: DataConfig | None,
    adapter: str | None,
    base: bool,
    retain_log: str | None,
    max_new_tokens: int,
    generate: bool,
    examples: int,
    format: Literal["nsru", "open-unlearning"],
    tasks: TaskSettings,
    muse: Literal["news", "books"] | None,
    muse_dir: str | None,
    muse_retain_log: str | None,
) -> RunFolder | None:
    """Evaluate, and write results.json, report and config.yaml; see ``nsru eval --help``.

    Returns:
        The folder of the results, in the process that wrote them.
    """
    check_range("max_new_tokens", max_new_tokens, "must be ≥ 1", whole=True)
    check_range("examples", examples, "must not be negative", whole=True)
    if base and adapter is not None:
        raise ValueError(
            f"adapter: {adapter} has no part in --base true, the model without one; leave one out."
        )
    of_run = data is None
    model, data = run_sections(run, model, data)
    loaded = load_data(data)
    if of_run:
        say_changed_sets(run, loaded.digests())
    theirs = format == "open-unlearning"
    reference = RetainLog.read(retain_log, theirs=theirs)
    if out and Path(out, "metrics.jsonl").exists():
        raise ValueError(f"out: {out} holds a training run; give another folder.")
    if muse is None and (muse_dir or muse_retain_log):
        raise ValueError("muse_dir, muse_retain_log: have no effect without muse; give --muse too.")
    texts = None if muse is None else Muse(muse, muse_dir, muse_retain_log)
    harness = Tasks(tasks) if tasks.tasks is not None else None
    shares = launched()
    together: Any = {"progress": shares.rank == 0, "shares": shares}
    network, tokenizer = load_model(model, data)
    loaded = without_long(loaded, tokenizer, data)
    if harness is not None:
        harness.check_template(tokenizer)
    if texts is not None:
        refuse_encoder_decoder(network, "muse")
    reference.check(loaded)
    out = out or (f"{run}/eval-base" if base else folder_of(run, adapter, "eval"))
    adapter = None if base else adapter or f"{run}/adapter"
    say_changed_adapter(run, adapter)
    if adapter is not None:
        load_adapter(network, adapter, tokenizer)
    folder = RunFolder(out).lock()
    evaluation = evaluate(
        network.eval(),
        tokenizer,
        loaded.splits(),
        safe=loaded.safe,
        retain_log=reference.ours,
        reference_auc=reference.auc,
        max_length=data.max_length,
        max_new_tokens=max_new_tokens,
        generate=generate,
        **together,
    )
    based = adapter is not None
    if based and generate and shares.rank == 0:
        add_base_answers(
            evaluation, network, tokenizer, max_new_tokens=max_new_tokens, examples=examples
        )
    if harness is not None:
        evaluation.tasks += harness.evaluate(network, tokenizer, base=based, shares=shares)
    logs: dict[str, dict[str, Any]] = {}
    if texts is not None:
        evaluation.tasks += texts.evaluate(network, tokenizer, base=based, **together)
        evaluation.notes += texts.notes
        logs["MUSE"] = texts.log
    if theirs:
        plain = _merge_for_attacks(evaluation, network, adapter)
        add_attack_scores(
            evaluation.rows, network, tokenizer,
            max_length=data.max_length, gradients=plain, **together,
        )  # fmt: skip
        logs["TOFU"] = _to_their_log(evaluation, reference.theirs)
    if not base:
        evaluation.notes += refused_elsewhere(
            {
                name: {row["question"]: row["generated"] for row in rows if "generated" in row}
                for name, rows in evaluation.rows.items()
                if name != "forget"
            },
            [loaded.safe.target(qa) for qa in loaded.forget],
        )
    if shares.rank:
        return None  # the first process writes
    setup = _setup(loaded, tokenizer)
    evaluation.notes += reference.notes(setup)
    results = {**to_results(evaluation, examples), "setup": setup}
    for name, whole in logs.items():
        for part, content in (("EVAL", whole), ("SUMMARY", open_unlearning.summary(whole))):
            atomic_write(folder.path / f"{name}_{part}.json", to_json(content, indent=2))
    folder.write_config(
        {
            "model": asdict(model),
            "data": asdict(data),
            "adapter": adapter,
            "retain_log": retain_log,
            "max_new_tokens": max_new_tokens,
            "generate": generate,
            "examples": examples,
            "format": format,
            **asdict(tasks),
            "muse": muse,
            "muse_dir": muse_dir,
            "muse_retain_log": muse_retain_log,
        }
    )
    folder.write_environment()
    folder.write_results(results)
    write_report(folder.path)
    print(format_table(results))
    return folder


def _merge_for_attacks(evaluation: Evaluation, network: nn.Module, adapter: str | None) -> bool:
    """Merge the adapter, for OpenUnlearning's attack by gradients reads those of the weights.

    Returns:
        Whether that can be done; where not, a note says why the attack is left out.
    """
    why = "what was trained is no plain LoRA"
    if adapter is None or is_plain(adapter):
        try:
            if adapter is not None:
                nk.merge_adapters(network)
            return True
        except ValueError as error:
            why = str(error)
    evaluation.notes.append(f"mia_gradnorm: left out, {why}")
    return False


def _to_their_log(evaluation: Evaluation, retain_log: dict[str, Any] | None) -> dict[str, Any]:
    """The content of TOFU_EVAL.json; its forget quality becomes that of the evaluation."""
    log = open_unlearning.to_log(evaluation.rows, retain_log)
    quality = open_unlearning.summary(log).get("forget_quality")
    if retain_log is not None and quality is not None:  # ours is read off another kind of log
        evaluation.overall["forget_quality"] = quality
        evaluation.notes = [
            note for note in evaluation.notes if not note.startswith("forget_quality: needs")
        ]
    return log
