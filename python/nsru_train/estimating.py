"""Retain subspaces for a run: loaded, or estimated on its questions with their answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nsru_kernels as nk
from nsru_kernels.files import atomic_write, read_json
from nsru_kernels.nn.inputs import is_distributed
from nsru_kernels.subspaces.collection import LITTLE, SubspaceSet
from nsru_train.config import SubspaceConfig
from nsru_train.data.encode import (
    IGNORE_INDEX,
    Encoded,
    collate,
    encode_qa,
    length_batches,
    pad_token_id,
    prompt_text,
)
from nsru_train.data.records import QA
from nsru_train.language_models import check_sequences, is_encoder_decoder, split_for_decoder
from nsru_train.own_texts import own_texts
from nsru_train.run_folder import RunFolder, to_json
from nsru_train.sources import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SETS = "sets.json"  # beside the subspaces
_WORDS = {"forget_texts": "forget set", "retain_texts": "retain set", "prompt": "prompt"}


def find_subspaces(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[QA],
    retain: Sequence[QA],
    config: SubspaceConfig | None = None,
    *,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> SubspaceSet:
    """The retain subspaces of a run: loaded from config.path, else estimated on the retain set.

    One forward of every question with its answer, in one pass. In an initialised process group each
    process streams its share of the sets.

    Args:
        model: the base model, without adapters.
        tokenizer: of the model.
        forget: questions with the answers to forget, on which the room left for edits is measured.
        retain: questions with the answers to keep: what their tokens excite is protected.
        config: which layers, how wide, how the rank is chosen; None takes all linear layers and the
            largest rank that leaves a share of 0.05 of the forget answers' activations open. What
            is in path is taken whole; targets and exclude are for `unlearn` then.
        max_length: most tokens of a question with its answer.
        seed: of the random test matrix.
        progress: show progress bars.

    Returns:
        Module name -> `nsru_kernels.RetainSubspace`, whose basis is [K, Q] float32; print its
        ``table()``, keep it with ``save(folder)``.

    Raises:
        ValueError: they come from another base model, or more than one rank rule is given.
    """
    config = config or SubspaceConfig()
    if config.path is not None:
        warn_of_path(config, estimated_on(tokenizer, forget, retain))
    read = () if config.path is not None else (forget, retain)
    encoded_forget, encoded_retain = [
        [encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length) for qa in records]
        for records in read
    ] or ([], [])
    return subspaces_of(
        model, tokenizer, encoded_forget, encoded_retain, config, seed=seed, progress=progress
    )


def subspaces_of(
    model: nn.Module,
    tokenizer,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    config: SubspaceConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SubspaceSet:
    """`find_subspaces` of sets that are encoded already."""
    if config.path is not None:
        subspaces = SubspaceSet.load(config.path)
        subspaces.check_model(model)
        _check_room(subspaces)
        return subspaces
    # Protect every position, but measure the room where forgetting has to act: template and first
    # token are the same in both sets, and with them a rank looks tighter than it is.
    retain_batches, forget_batches = (
        encoded_batches(
            model, tokenizer, encoded,
            max_tokens=config.max_tokens, answers_only=encoded is forget,
        )
        for encoded in (retain, forget)
    )  # fmt: skip
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    count = config.own_texts
    own = (
        own_texts(model, tokenizer, count, seed=seed, part=(rank, world), progress=progress)
        if count
        else ()
    )
    subspaces = nk.estimate_retain_subspaces(
        model,
        [*retain_batches[rank::world], *own],
        config.targets,
        exclude=config.exclude,
        width=config.width,
        forget_batches=forget_batches[rank::world],
        unit_tokens=True,
        seed=seed,
        progress=progress,
        **config.rule(),
    )
    _check_room(subspaces)
    return subspaces


def _check_room(subspaces: SubspaceSet) -> None:
    """Raise ValueError when no input leaves anything to train, warn where one does or is plain."""
    full = [entry for entry in subspaces.inputs if entry.rank == entry.in_features]
    plain = [entry for entry in subspaces.inputs if entry.rank == 0]
    count = len(subspaces.inputs)
    if len(full) == count:
        raise ValueError(
            f"subspace: all {count} retain subspaces have full rank, such as {full[0].name} with "
            f"{full[0].rank}: no update is left in their null space. Lower rank or energy, or use "
            "min_editability."
        )
    for entries, effect in ((full, "nothing is trained there"), (plain, "nothing is protected")):
        if entries:
            logger.warning(
                "%d of %d retain subspaces have rank %d, such as %s: %s.",
                len(entries), count, entries[0].rank, entries[0].name, effect,
            )  # fmt: skip
    tight = [entry for entry in subspaces.inputs if entry.room < LITTLE and entry not in full]
    if tight:
        logger.warning(
            "%d of %d retain subspaces leave less than %.0f %% of the forget answers' energy open, "
            "such as %s: what is trained there hardly forgets, and changes what is in neither set. "
            "A lower rank or energy, or min_editability, leaves more.",
            len(tight), count, 100 * LITTLE, tight[0].name,
        )  # fmt: skip


def run_subspaces(
    run: RunFolder,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[QA],
    retain: Sequence[QA],
    config: SubspaceConfig,
    *,
    resume: bool = False,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> SubspaceSet:
    """`find_subspaces`, kept in the run's folder; those that are there already on ``resume``."""
    own = run.path / "subspaces"
    if resume and (own / "index.json").exists():
        return subspaces_of(model, tokenizer, (), (), replace(config, path=str(own)))
    found = find_subspaces(
        model, tokenizer, forget, retain, config,
        max_length=max_length, seed=seed, progress=progress,
    )  # fmt: skip
    if run.writes:
        found.save(own)
        if config.path is None:
            kept: Mapping[str, Any] = estimated_on(tokenizer, forget, retain)
        else:
            kept = _sets_of(config.path)
        atomic_write(own / _SETS, to_json(kept))
    return found


def estimated_on(
    tokenizer: PreTrainedTokenizerBase, forget: Sequence[QA], retain: Sequence[QA]
) -> dict[str, str]:
    """All of a run that its subspaces depend on, beside model and settings.

    Digests of both sets' texts in whatever order, and the prompt around a question.
    """

    def texts(records: Sequence[QA]) -> str:
        return digest([QA(*pair) for pair in sorted((qa.question, qa.answer) for qa in records)])

    return {
        "forget_texts": texts(forget),
        "retain_texts": texts(retain),
        "prompt": prompt_text(tokenizer, "{}"),
    }


def _sets_of(folder: str) -> Mapping[str, Any]:
    try:
        return read_json(Path(folder, _SETS))
    except (OSError, ValueError):  # of the API, or of a version that did not keep them
        return {}


def warn_of_path(config: SubspaceConfig, sets: Mapping[str, str]) -> None:
    """Say what a folder of estimated subspaces leaves without effect, and what was other then."""
    if config.path is None:
        return
    before = _sets_of(config.path)
    other = [w for key, w in _WORDS.items() if key in before and before[key] != sets[key]]
    if other:
        logger.warning(
            "subspace.path: the subspaces in %s were estimated on another %s. What they do not "
            "hold is not protected, and alpha goes by the room that they left.",
            *(config.path, " and ".join(other)),
        )
    if unused := config.unused():
        logger.warning(
            "subspace.path: the subspaces in %s are used as they are; subspace.%s has no effect.",
            config.path,
            ", subspace.".join(unused),
        )


def token_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[QA],
    *,
    max_tokens: int,
    max_length: int,
    answers_only: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Questions with their answers as model inputs, batched by length.

    answers_only adds a token_mask of the positions that predict an answer's token or EOS. For an
    encoder-decoder, where one mask cannot stand for both parts, each is a batch, and all counts.
    """
    encoded = [
        encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length) for qa in records
    ]
    return encoded_batches(
        model, tokenizer, encoded,
        max_tokens=max_tokens, answers_only=answers_only,
    )  # fmt: skip


def encoded_batches(
    model: nn.Module,
    tokenizer,
    encoded: Sequence[Encoded],
    *,
    max_tokens: int,
    answers_only: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """`token_batches` of what is encoded already."""
    check_sequences(model, encoded)
    device, pad = next(model.parameters()).device, pad_token_id(tokenizer, model)
    batches = []
    apart = is_encoder_decoder(model)
    alone = [[i] for i in range(len(encoded))]
    for ids in alone if apart else length_batches(encoded, max_tokens):
        batch = collate([encoded[i] for i in ids], pad)
        if apart:
            batch, _ = split_for_decoder(model, batch)
        elif answers_only:
            batch["token_mask"] = F.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1))
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches
