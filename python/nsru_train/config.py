"""Settings of a run: each field is a flag of the command line and a key in config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nsru_kernels.checks import check_settings
from nsru_train.methods import Objective

__all__ = ["DataConfig", "LoraConfig", "ModelConfig", "Objective", "SubspaceConfig", "TrainConfig"]


def _absolute(name: str | None) -> Any:
    """A file or folder as a path that holds in every working directory; other names as they are."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


@dataclass
class ModelConfig:
    """The base model.

    Args:
        path: local folder or hub id of a language model of transformers; of a vision-language one
            the text part is trained.
        dtype: of the weights; auto takes what the checkpoint says.
        device: "auto" is the GPU where there is one, else the CPU.
        trust_remote_code: run code that comes with the model.
        quantize: hold the weights of linear layers in 4 or 8 bits (NF4, LLM.int8; needs
            bitsandbytes); adapters stay in float32.
        tokenizer: folder or hub id of the tokenizer, where it does not lie with the model.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    quantize: Literal["none", "nf4", "int8"] = "none"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_settings("model", self)
        self.path, self.tokenizer = _absolute(self.path), _absolute(self.tokenizer)


@dataclass
class DataConfig:
    """Questions and answers.

    A set is a JSON, JSONL, CSV or Parquet file of question/answer, prompt/completion or messages
    records, "tofu:NAME" (a file of data_dir, or of the hub's locuslab/TOFU), or
    "authors:forget|retain|holdout" (fictitious authors made on the spot).

    Args:
        forget: what to forget.
        retain: what to keep; must not overlap with forget.
        data_dir: folder with TOFU's files; none means the hub.
        safe_targets: template or refusal file; none means the built-in templates.
        more: further sets for evaluation by name: retain_unseen, holdout, real_authors,
            world_facts.
        max_length: most tokens of a question with its answer.
        truncate: cut answers that are longer instead of refusing them.
        skip: leave out questions that are longer, with a line that says how many.
        question_column: name of the questions' column or field in your files.
        answer_column: name of the answers' column or field in your files.
        domain_column: name of the column or field that says the part of the knowledge that a record
            belongs to, where there is one; some methods unlearn those parts apart.
        system_prompt: system message before every question; needs a chat template.
        chat_template_kwargs: further variables of the chat template, such as
            {"enable_thinking": false}.
        write_alternatives: other answers that the model itself writes for each question to forget
            that brings none, for methods that teach them (altpo, lune).
        own_requests: ordinary requests that a chat model makes up itself, with its own answers,
            which join the retain set of training: against safe answers where none is wanted.
    """

    forget: str
    retain: str
    data_dir: str | None = None
    safe_targets: str | None = None
    more: dict[str, str] = field(default_factory=dict)
    max_length: int = 512
    truncate: bool = False
    skip: bool = False
    question_column: str = "question"
    answer_column: str = "answer"
    domain_column: str = "domain"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    write_alternatives: int = 0
    own_requests: int = 0

    def __post_init__(self) -> None:
        check_settings(
            "data",
            self,
            max_length="must be ≥ 1",
            write_alternatives="must not be negative",
            own_requests="must not be negative",
        )
        if self.truncate and self.skip:
            raise ValueError("data: give truncate or skip, not both.")
        self.forget, self.retain = _absolute(self.forget), _absolute(self.retain)
        self.data_dir = _absolute(self.data_dir)
        self.safe_targets = _absolute(self.safe_targets)
        self.more = {name: _absolute(path) for name, path in self.more.items()}


@dataclass
class SubspaceConfig:
    """The retain subspaces. Give at most one of rank, energy and min_editability.

    Args:
        targets: "all-linear", names of linear layers, their ends, or regular expressions; "experts"
            for fused experts.
        exclude: targets to leave alone, named like them.
        path: folder of subspaces estimated before; none estimates them.
        width: of the sketch: so many directions can be found, and all of an input that is less than
            four times as wide.
        rank: fixed rank of every subspace.
        energy: captured share of the retain activations' energy, 0 to 1.
        min_editability: share of the forget answers' activations, every token counting alike, that
            must stay open to edits; the rank is the largest that leaves it, at least 1. Used when
            none of the three is given.
        own_texts: number of texts, sampled from the model itself, that join the retain set here and
            stand for what it knows in general. On SmolLM2 they helped little (docs/unlearning.md).
            Not for a model that recites what it shall forget when it is asked nothing.
        max_tokens: of one batch, padding included.
    """

    targets: list[str] | str = field(default_factory=lambda: ["all-linear"])
    exclude: list[str] | str = field(default_factory=list)
    path: str | None = None
    width: int = 512
    rank: int | None = None
    energy: float | None = None
    min_editability: float | None = None
    own_texts: int = 0
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        self.targets = [self.targets] if isinstance(self.targets, str) else self.targets
        self.exclude = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        self.path = _absolute(self.path)
        check_settings(
            "subspace",
            self,
            width="must be ≥ 1",
            rank="must not be negative",
            energy="must be a share above 0 and at most 1",
            min_editability="must be a share above 0 and at most 1",
            own_texts="must be 0 (none) or more",
            max_tokens="must be ≥ 1",
        )
        self.rule()

    def unused(self) -> list[str]:
        """Names of the settings that a path leaves without effect."""
        names = ("width", "rank", "energy", "min_editability", "own_texts")
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in names if getattr(self, name) != defaults[name]]
        return changed if self.path else []

    def rule(self) -> dict[str, Any]:
        """The one rule that chooses the rank, as a keyword argument."""
        given = {
            name: value
            for name in ("rank", "energy", "min_editability")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise ValueError(f"subspace: give one of rank, energy, min_editability, got {given}.")
        if self.rank is not None and self.rank > self.width:
            raise ValueError(
                f"subspace.rank must be at most subspace.width, {self.width}, got {self.rank}; "
                f"give a width of {self.rank + 64}."
            )
        return given or {"min_editability": DEFAULT_MIN_EDITABILITY}


# docs/unlearning.md has the sweep; 0.05 kept most of the retain set at equal forgetting.
DEFAULT_MIN_EDITABILITY = 0.05


@dataclass
class LoraConfig:
    """The adapters.

    Args:
        rank: R.
        alpha: updates are scaled by alpha / rank, and where they are projected by 1 / √editability
            besides, so that one lr suits every subspace and none.
        rank_pattern: other ranks for some layers, as in PEFT, such as {q_proj: 16}: name, its end,
            or a regular expression; the first that fits counts.
        alpha_pattern: the same for alpha.
        dropout: on the adapters' input; above 0 the null space holds in expectation only.
        project: confine the update to the null space of the retain subspaces; false is plain LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    project: bool = True

    def __post_init__(self) -> None:
        check_settings(
            "lora",
            self,
            rank="must be ≥ 1",
            alpha="must be a finite number above 0",
            rank_pattern="must be ≥ 1",
            alpha_pattern="must be a finite number above 0",
            dropout="must be a share from 0 to below 1",
        )


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        steps: optimizer steps.
        lr: peak learning rate of AdamW. Chosen on models of a few million parameters; for billions,
            1e-4 to 2e-4 are usual with LoRA.
        lr_scheduler_type: what the learning rate does after the warm-up, as transformers names it.
        lr_scheduler_kwargs: of that scheduler: cosine_with_restarts has one cycle, and so no
            restart, without {num_cycles: 3}.
        warmup: share of the steps.
        batch_size: forget questions in a batch; each brings its safe target and retain questions.
        retain_per_forget: retain questions for each forget question.
        accumulate: batches for one optimizer step, also over the end of an epoch; each question
            weighs the same.
        weight_decay: of AdamW.
        save_steps: steps between checkpoints; 0 writes none.
        retain_stop_ratio: stop when the retain loss exceeds this many times its start (which counts
            as 0.1 nats a token where it is less); none never stops.
        gradient_checkpointing: recompute activations in backward to save memory.
        bf16: autocast to bfloat16, for a model whose weights are float32.
        eval_steps: steps between probabilities of every set in metrics.jsonl; 0 has none.
        report_to: where transformers reports metrics beside metrics.jsonl: tensorboard, wandb, …
        seed: of adapters, order and dropout.
    """

    steps: int = 150
    lr: float = 5e-4
    warmup: float = 0.05
    batch_size: int = 8
    retain_per_forget: int = 1
    accumulate: int = 1
    weight_decay: float = 0.0
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    save_steps: int = 50
    retain_stop_ratio: float | None = 5.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    eval_steps: int = 0
    report_to: list[str] | str = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        check_settings(
            "train",
            self,
            steps="must be ≥ 1",
            lr="must not be negative",
            warmup="must be a share from 0 to 1",
            batch_size="must be ≥ 1",
            retain_per_forget="must be ≥ 1",
            accumulate="must be ≥ 1",
            weight_decay="must not be negative",
            save_steps="must be 0 (none) or more",
            retain_stop_ratio="must be above 1, or null for no early stop",
            eval_steps="must be 0 (none) or more",
            seed="must be from 0 to 2³² - 1",
        )
