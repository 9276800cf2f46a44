"""Kinds of language models of transformers: causal ones, encoder-decoders, vision-language ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any


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
    )

    try:
        trusted = options.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        # BART would load as a causal model too, without its encoder.
        seq2seq = getattr(config, "is_encoder_decoder", False)
    except (OSError, ValueError):  # such as a folder of an adapter, which names its base
        seq2seq = False
    if seq2seq:
        raise ValueError("it is an encoder-decoder, which trains from Python, not by a command")
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return AutoModelForImageTextToText.from_pretrained(path, **options)


def copy_processor(model: Any, folder: str | os.PathLike[str]) -> None:
    """Put what reads the images of a vision-language model beside a copy of it."""
    from transformers.utils import cached_file

    if getattr(model.config, "text_config", None) is None:
        return
    for kind in ("preprocessor", "processor", "video_preprocessor"):
        with contextlib.suppress(OSError):  # each model has some of them
            shutil.copy(cached_file(model.name_or_path, f"{kind}_config.json"), folder)
