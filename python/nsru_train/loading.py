"""The beginning of a run: sets of questions, checked, and the model with its tokenizer."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nsru_kernels.dispatch import default_device
from nsru_kernels.dispatch.choice import unavailable
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.ops.project.backends import PROJECT
from nsru_train.config import DataConfig, ModelConfig
from nsru_train.data.encode import TextFormat, dated, is_too_long, served_otherwise, use_format
from nsru_train.data.records import QA, check_disjoint, normalise, repeated_questions
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.evaluation import SPLITS
from nsru_train.language_models import (
    end_tokens,
    is_encoder_decoder,
    load_language_model,
    looks_ahead,
    position_limit,
)
from nsru_train.quantized import check_bitsandbytes, dense_experts, is_quantised, quantizing
from nsru_train.sources import digest, load_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MORE_SPLITS = tuple(name for name in SPLITS if name not in ("forget", "retain"))


@dataclass
class Data:
    """The sets of a run, checked.

    Args:
        forget: questions with the answers to forget.
        retain: questions with the answers to keep.
        more: further sets for evaluation by name; `evaluate` knows retain_unseen, holdout,
            real_authors and world_facts.
        safe: gives each forget question the answer wanted instead.
        own: requests that the model made up, kept like retain but no part of evaluations.

    Raises:
        ValueError: forget or retain is empty, or sets share questions that they must not share.
    """

    forget: list[QA]
    retain: list[QA]
    more: dict[str, list[QA]] = field(default_factory=dict)
    safe: SafeTargets = field(default_factory=SafeTargets)
    own: list[QA] = field(default_factory=list)

    def __post_init__(self) -> None:
        if taken := sorted({"forget", "retain", "safe"} & self.more.keys()):
            raise ValueError(f"Data: more must hold further sets, got another {taken[0]!r}.")
        check_disjoint(self.forget, self.retain, self.more)
        for qa in self.forget:
            if normalise(self.safe.target(qa)) == normalise(qa.answer):
                raise ValueError(
                    f"data.safe_targets: for {qa.question!r:.60} it is the answer that is to be "
                    f"forgotten, {qa.answer!r:.60}; give the record a safe_target, or leave it out."
                )

    @property
    def kept(self) -> list[QA]:
        """Questions of the retain loss."""
        return [*self.retain, *self.own]

    def splits(self) -> dict[str, list[QA]]:
        """Every set by its name in evaluations."""
        return {"forget": self.forget, "retain": self.retain, **self.more}

    def digests(self) -> dict[str, str]:
        """Of every set, as a run's results keep it."""
        return {name: digest(records) for name, records in self.splits().items()}


def load_data(config: DataConfig) -> Data:
    """Read every set.

    Raises:
        ValueError: one is unreadable or empty, or shares questions that it must not share.
    """
    if unknown := sorted(config.more.keys() - set(MORE_SPLITS)):
        raise ValueError(
            f"data.more: names must be out of {', '.join(MORE_SPLITS)}, got {', '.join(unknown)}."
        )

    def read(spec: str) -> list[QA]:
        return load_records(
            spec,
            config.data_dir,
            question_column=config.question_column,
            answer_column=config.answer_column,
            domain_column=config.domain_column,
        )

    forget, retain = read(config.forget), read(config.retain)
    if config.domain_column != "domain" and not any(qa.domain for qa in forget):
        raise ValueError(
            f"data.domain_column: no forget record has a {config.domain_column!r}; correct the "
            "name, or leave it out."
        )
    more = {name: read(spec) for name, spec in config.more.items()}
    data = Data(forget, retain, more, SafeTargets.from_file(config.safe_targets))
    for name, records in data.splits().items():
        if again := repeated_questions(records):
            logger.warning(
                "data.%s: %d of %d records ask what an earlier one asks, such as %r; each counts.",
                name, len(again), len(records), again[0],
            )  # fmt: skip
    return data


def without_long(data: Data, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Data:
    """The sets without the records of which a text is too long, where config.skip says so.

    Where config.truncate says that answers are cut, the sets as they are. Either is said in a line,
    and so are answers that the tokenizer cannot write.
    """
    _warn_of_unknown(data, tokenizer)
    if not (config.skip or config.truncate):
        return data

    def fits(qa: QA, *more: str) -> bool:
        answers = [qa.answer, qa.paraphrased_answer or qa.answer, *qa.perturbed_answers, *more]
        pairs = [(qa.question, answer) for answer in answers]
        pairs.append((qa.paraphrased_question or qa.question, qa.answer))
        return not any(is_too_long(tokenizer, *p, max_length=config.max_length) for p in pairs)

    kept = {name: [qa for qa in records if fits(qa)] for name, records in data.splits().items()}
    kept["forget"] = [
        qa for qa in kept["forget"] if fits(qa, data.safe.target(qa), *qa.alternatives)
    ]
    taught = {**dict.fromkeys(kept, ""), "forget": " with their safe targets"}
    option, effect = ("skip", "left out") if config.skip else ("truncate", "their answers cut")
    for name, records in data.splits().items():
        if too_long := len(records) - len(kept[name]):
            logger.warning("data.%s: %d of %d %s records%s are too long and %s.",
                           option, too_long, len(records), name, taught[name], effect)  # fmt: skip
        if not kept[name] and config.skip:
            raise ValueError(
                f"data.skip: no {name} record fits in max_length {config.max_length}"
                f"{taught[name]}; raise it."
            )
    return Data(kept.pop("forget"), kept.pop("retain"), kept, data.safe) if config.skip else data


def _warn_of_unknown(data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say where answers hold tokens unknown to the tokenizer: several can become the same."""
    unknown = tokenizer.unk_token_id
    for name, records in data.splits().items() if unknown is not None else ():
        odd = sum(
            unknown in tokenizer(qa.answer, add_special_tokens=False).input_ids for qa in records
        )
        if odd:
            logger.warning(
                "%d of %d %s answers hold characters that the tokenizer cannot write: they are "
                "trained and scored as %s there.",
                odd, len(records), name, tokenizer.unk_token,
            )  # fmt: skip


def load_model(
    config: ModelConfig | str, data: DataConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of transformers and its tokenizer, ready for this package.

    Args:
        config: says where it is, or that place itself: a folder or a hub id.
        data: how the tokenizer writes texts: system prompt, chat template's variables, truncation;
            None leaves these out. Where the template writes the date, its variable gets today's.

    Returns:
        (model, tokenizer), the model in eval mode, on the GPU where there is one.

    Raises:
        ValueError: transformers cannot load them, or the chat template cannot write the texts.
    """
    from transformers import AutoTokenizer

    config = ModelConfig(config) if isinstance(config, str) else config
    device = _device(config.device)
    backend = requested_backend("auto")
    if reason := unavailable(PROJECT, backend, device):
        raise ValueError(f"NSRU_BACKEND: {backend!r} cannot serve: {reason} Or unset NSRU_BACKEND.")
    _check_folder(config.path)
    if config.quantize != "none":
        check_bitsandbytes(config.quantize)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer or config.path, trust_remote_code=config.trust_remote_code
        )
        model = load_language_model(
            config.path,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            **({} if config.quantize == "none" else quantizing(config, device)),
        )
    except Exception as error:  # a damaged file raises anything in transformers
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "Unrecognized configuration class" in reason:
            kind = reason.partition("'")[2].partition("'")[0].rpartition(".")[2] or "another kind"
            reason = f"it is of {kind}, and of no language model such as Llama, T5 or Qwen2-VL"
        elif not Path(config.path).exists():
            reason = f"there is no such folder here, and the hub does not give it: {reason}"
        raise ValueError(
            f"model.path: cannot load {config.path!r} as a language model: {reason}"
        ) from error
    if config.quantize != "none" and not any(map(is_quantised, model.modules())):
        raise ValueError(
            f"model.quantize: bitsandbytes knows no layer of {config.path!r} "
            f"({type(model).__name__}), so nothing is in {config.quantize}; leave it at none."
        )
    if config.quantize != "none" and (passed_by := dense_experts(model)):
        logger.warning("model.quantize: %s.", passed_by)
    # A pad token is often added to a tokenizer without a row in the embedding.
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    text_format = TextFormat(
        end_tokens=end_tokens(model),
        max_length=position_limit(model),
        apart=is_encoder_decoder(model),
    )
    if data is not None:
        text_format = replace(
            text_format,
            system_prompt=data.system_prompt,
            template_kwargs=data.chat_template_kwargs,
            truncate=data.truncate,
        )
    try:
        use_format(tokenizer, text_format)
        otherwise = served_otherwise(tokenizer)
        _keep_date(tokenizer, data)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    if otherwise is not None:
        logger.warning("data: %s.", otherwise)
    # Quantised weights are where they were made, and not all of them can move.
    model = (model if model.device == device else model.to(device)).eval()
    if not is_encoder_decoder(model) and looks_ahead(model):
        raise ValueError(
            f"model.path: {type(model).__name__} of {config.path!r} reads the tokens that come "
            "later too, so that an answer would be scored with itself in sight; give a causal "
            "model (of BERT and its kind: is_decoder in its config.json)."
        )
    return model, tokenizer


def _keep_date(tokenizer: PreTrainedTokenizerBase, data: DataConfig | None) -> None:
    """Let the date that a chat template writes into prompts stay today's, where it has a name."""
    today = dated(tokenizer)
    if today is None:
        return
    if not today:
        remedy = "A system prompt of yours fixes it in some, else a template without the date does"
    elif data is None:
        remedy = f"use_format(tokenizer, TextFormat(template_kwargs={today})) fixes it"
    else:
        data.chat_template_kwargs = {**data.chat_template_kwargs, **today}
        kept = replace(tokenizer.text_format, template_kwargs=data.chat_template_kwargs)
        use_format(tokenizer, kept)
        remedy = f"Here it stays {next(iter(today.values()))}, by data.chat_template_kwargs"
    logger.warning(
        "data: the chat template writes today's date into prompts, so that another day would train "
        "and score other tokens. %s.",
        remedy,
    )


def _check_folder(path: str) -> None:
    """Raise ValueError for what can be no hub id and is no folder of a model either."""
    if Path(path).is_dir():
        if not any(Path(path, name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"model.path: folder {path} holds no config.json of a model.")
    elif Path(path).exists():
        raise ValueError(f"model.path: {path} is a file; give the folder that holds the model.")
    elif path.startswith((".", "~")) or Path(path).is_absolute() or path.count("/") > 1:
        raise ValueError(f"model.path: no folder {path}; give a model's folder, or a hub id.")


def _device(name: str) -> torch.device:
    if name == "auto":
        device = default_device()
        local_rank = os.environ.get("LOCAL_RANK")  # torchrun's: one GPU for each process
        if device.type == "cuda" and local_rank:
            return torch.device("cuda", int(local_rank))
        return device
    if name == "meta":
        raise ValueError("model.device: 'meta' holds no weights; give auto, cpu or cuda:N.")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model.device: {name!r} cannot be used here ({reason}); give auto, cpu or cuda:N. "
            "`nsru env` lists the devices."
        ) from error
