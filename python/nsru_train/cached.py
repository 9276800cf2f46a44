"""The decision at a prompt, kept with the KV cache that its answer is generated with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEPT = "_nsru_decision"  # attribute of a cache, [B, …]


class Turn:
    """A lock that one forward holds at a time, hooks and inner forwards included; copies are new.

    What is decided at a prompt reaches the layers by attributes of the model, which threads share.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Turn, ()

    def take(self) -> None:
        self._lock.acquire()

    def pass_on(self) -> None:
        self._lock.release()


def decision_at(arguments: Mapping[str, Any], tokens: Tensor) -> Any:
    """The decision for the tokens of a forward that go on after a cache; None where they begin.

    Args:
        arguments: keywords of the forward.
        tokens: of it, [B, S] or [B, S, D].

    Raises:
        ValueError: several tokens go on, or the cache is of no forward that `keep_decision` saw, or
            of other rows.
    """
    cache = next(filter(_holds_tokens, arguments.values()), None)
    if cache is None:
        return None
    kept, (rows, length) = getattr(cache, _KEPT, None), tokens.shape[:2]
    if length == 1 and kept is not None and len(kept) == rows:
        return kept
    what = f"{length} tokens on top of a KV cache"
    if length == 1:
        what = f"{rows} rows go on after {len(kept) if kept is not None else 'unknown'} prompts"
    raise ValueError(
        f"past_key_values: {what}. This model decides by the whole prompt: read prompts in one "
        "piece and decode the rows that were read, without prefill_chunk_size, a cache of earlier "
        "turns or of a system prompt, or an assistant_model."
    )


def keep_decision(arguments: Mapping[str, Any], output: Any, decision: Tensor) -> None:
    """Let the cache that a forward was given, or made, know what was decided at its prompt."""
    made = output.values() if isinstance(output, Mapping) else output
    for cache in filter(_is_cache, [*arguments.values(), *made]):
        kind: Any = type(cache)
        if not issubclass(kind, _Following):
            cache.__class__ = _following(kind)
        setattr(cache, _KEPT, decision)


class _Following:
    """Of a cache whose rows take their decision along."""

    def _take_along(self, name: str, rows: Any) -> Any:
        found = getattr(super(), name)(rows)
        kept: Tensor = getattr(self, _KEPT)
        again = name == "batch_repeat_interleave"
        moved = kept.repeat_interleave(rows, 0) if again else kept[rows.to(kept.device)]
        setattr(self, _KEPT, moved)
        return found

    def reorder_cache(self, beam_idx: Any) -> Any:
        return self._take_along("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Any) -> Any:
        return self._take_along("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> Any:
        return self._take_along("batch_repeat_interleave", repeats)


@functools.cache
def _following(kind: type) -> type:
    return type(kind.__name__, (_Following, kind), {})


def token_mask(mask: Any, tokens: Tensor) -> Tensor:
    """True where one of ``tokens`` [B, S] or [B, S, D] is no padding, [B, S]; without a mask all.

    Raises:
        ValueError: the mask is of another form.
    """
    wanted = tuple(tokens.shape[:2])
    if mask is None:
        return torch.ones(wanted, dtype=torch.bool, device=tokens.device)
    shape = tuple(getattr(mask, "shape", ())) or type(mask).__name__
    if shape != wanted:
        raise ValueError(
            f"attention_mask must be [B, S] = {wanted} where a model decides by the prompt, got "
            f"{shape}; static caches and generate_batch make others: generate without "
            "cache_implementation."
        )
    return mask.bool()


def _is_cache(argument: Any) -> bool:
    return hasattr(argument, "get_seq_length")


def _holds_tokens(argument: Any) -> bool:
    """True for a cache, whatever the model calls it, of tokens that came before."""
    if not _is_cache(argument):
        return False
    try:
        return bool(argument.get_seq_length() > 0)
    except ValueError:  # it has no attention layer
        return bool(argument.has_previous_state())
