"""Kinds of language models of transformers: causal ones, encoder-decoders, vision-language ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.nn.wrapped import keep_unpacked
from nsru_train.data.encode import IGNORE_INDEX


def load_language_model(path: str | os.PathLike[str], **options: Any) -> Any:
    """The model in a folder or of a hub id, whole, by the class of transformers for its kind.

    Args:
        options: of ``from_pretrained``.

    Raises:
        ValueError: it is no language model. Damaged files raise anything in transformers.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    def load(kind: Any) -> Any:
        model = kind.from_pretrained(path, **options)
        keep_unpacked(model)
        return model

    config = None
    with contextlib.suppress(OSError, ValueError):  # a folder of an adapter, which names its base
        trusted = options.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    # BART would load as a causal model too, without its encoder.
    if getattr(config, "is_encoder_decoder", False):
        return load(AutoModelForSeq2SeqLM)
    try:
        return load(AutoModelForCausalLM)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return load(AutoModelForImageTextToText)


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model reads the prompt by an encoder and writes the answer by a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refuse_encoder_decoder(model: Any, what: str) -> None:
    """Raise ValueError where ``what`` needs a model that reads prompt and answer in one go."""
    if is_encoder_decoder(model):
        raise ValueError(
            f"{what} needs a decoder that reads the prompt itself, and {type(model).__name__} is "
            "an encoder-decoder; leave it out, or take another method, such as nsru."
        )


def split_for_decoder(model: Any, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts for the encoder and answers for the decoder of a batch that holds both in a row.

    Args:
        batch: of `collate`: input_ids, attention_mask and labels [B, S].

    Returns:
        input_ids and attention_mask [B, P] of the prompts, decoder_input_ids [B, N]; and labels
        [B, N], each at the place that predicts it.
    """
    answer_BS = batch["labels"] != IGNORE_INDEX
    starts_B1 = answer_BS.int().argmax(1, keepdim=True)
    prompt, longest = int(starts_B1.max()), int(answer_BS.sum(1).max())
    steps_N = torch.arange(longest, device=starts_B1.device)
    labels_BN = F.pad(batch["labels"], (0, longest), value=IGNORE_INDEX).gather(
        1, starts_B1 + steps_N
    )
    mask_BS = batch["attention_mask"] * ~answer_BS
    inputs = {
        "input_ids": batch["input_ids"][:, :prompt],
        "attention_mask": mask_BS[:, :prompt],
        "decoder_input_ids": decoder_inputs(model, labels_BN),
    }
    return inputs, labels_BN


def decoder_inputs(model: Any, labels_BN: Tensor) -> Tensor:
    """What the decoder reads to predict ``labels``. Raises ValueError where it does not say so."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ValueError(
            f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels, by which "
            "transformers says what its decoder reads; take an encoder-decoder such as T5 or BART."
        )
    return prepare(labels=labels_BN)


def copy_processor(model: Any, folder: str | os.PathLike[str]) -> None:
    """Put what reads the images of a vision-language model beside a copy of it."""
    from transformers.utils import cached_file

    if getattr(model.config, "text_config", None) is None:
        return
    for kind in ("preprocessor", "processor", "video_preprocessor"):
        with contextlib.suppress(OSError):  # each model has some of them
            shutil.copy(cached_file(model.name_or_path, f"{kind}_config.json"), folder)
