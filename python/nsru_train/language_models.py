"""Language models of transformers: their kinds, and what they can read."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsru_kernels.nn.wrapped import keep_unpacked
from nsru_train.data.encode import IGNORE_INDEX, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_POSITION_TABLE = re.compile(
    r"(?:^|\.)(?:wpe|embed_positions|positions_embed|position_embeddings|pos_encoding)$"
)


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
        if getattr(model.config, "rescale_every", 0):
            model.config.rescale_every = 0  # RWKV would divide its weights in place to answer
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
    """True where a model reads the prompt by an encoder and writes the answer by a decoder."""
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
    """The decoder's input for ``labels``. Raises ValueError where the model does not say it."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ValueError(
            f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels, by which "
            "transformers says what its decoder reads; take an encoder-decoder such as T5 or BART."
        )
    return prepare(labels=labels_BN)


def position_limit(model: nn.Module) -> int | None:
    """Rows of a position table; None for a model without one, such as most rotary ones."""
    for name, buffer in model.named_buffers():
        if buffer.dim() == 2 and _POSITION_TABLE.search(name):  # GPT-J, CodeGen, CTRL
            return len(buffer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa
            return module.num_embeddings - getattr(module, "offset", reserved)  # OPT's offset
    return None


def check_sequences(model: nn.Module, encoded: Sequence[Encoded]) -> None:
    """Raise ValueError where the model has no embedding of a token or no position for it.

    Without a table of positions, one beyond those that its config states is said once.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", math.inf)
    highest = max((max(one.input_ids, default=0) for one in encoded), default=0)
    if highest >= rows:
        raise ValueError(
            f"a text has token {highest}, {type(model).__name__} has embeddings of {rows}; give "
            "the model's own tokenizer, or resize its embeddings to the tokenizer"
        )
    longest, limit = max(map(len, encoded), default=0), position_limit(model)
    stated, kind = _stated_positions(model), type(model).__name__
    if limit is None and stated is not None and longest > stated and (kind, stated) not in _warned:
        _warned.add((kind, stated))
        logger.warning(
            "a text has %d tokens, %s is made for %d positions (max_position_embeddings): it may "
            "not understand what lies beyond them. Shorten such texts, or set max_length to %d.",
            *(longest, kind, stated, stated),
        )
    if limit is not None and longest > limit:
        raise ValueError(
            f"a text has {longest} tokens, {type(model).__name__} has {limit} positions; shorten "
            "it, or set max_length to leave it out"
        )


_warned: set[tuple[str, int]] = set()  # copies of a model, as `nsru compare` makes, are one


def _stated_positions(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    stated = getattr(config, "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """True where the logits of a token change by more than rounding with a token behind it.

    False where the model does not run on four tokens alone."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(4, device=next(model.parameters()).device)[None] % rows
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    try:
        first, second = model(input_ids=torch.cat([ids, other])).logits[:, :-1].float()
    except Exception:  # a model can need more than that
        return False
    exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    change = (first - second).abs().max() / first.std().clamp_min(1e-30)
    return bool(change > (1e-3 if exact else 0.1))


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The EOS tokens of the model's generation config."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, Iterable) else [eos]) - {None}


def copy_processor(model: Any, folder: str | os.PathLike[str]) -> None:
    """Put what reads the images of a vision-language model beside a copy of it."""
    from transformers.utils import cached_file

    if getattr(model.config, "text_config", None) is None:
        return
    for kind in ("preprocessor", "processor", "video_preprocessor"):
        with contextlib.suppress(OSError):  # each model has some of them
            shutil.copy(cached_file(model.name_or_path, f"{kind}_config.json"), folder)
