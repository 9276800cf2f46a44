"""The decision at a prompt, kept with the KV cache that its answer is generated with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_KEPT = "_nsru_decision"  # attribute of a cache


def decision_at(arguments: Mapping[str, Any], length: int) -> Any:
    """The decision for the tokens of a forward that go on after a cache; None where they begin.

    Args:
        arguments: keywords of the forward.
        length: number of tokens.

    Raises:
        ValueError: several tokens go on, or the cache is of no forward that `keep_decision` saw.
    """
    cache = next(filter(_holds_tokens, arguments.values()), None)
    if cache is None:
        return None
    kept = getattr(cache, _KEPT, None)
    if length == 1 and kept is not None:
        return kept
    what = f"{length} tokens on top of" if length > 1 else "a token on top of the unknown tokens of"
    raise ValueError(
        f"past_key_values: {what} a KV cache. This model decides by the whole prompt: read prompts "
        "in one piece, without prefill_chunk_size, a cache of earlier turns or of a system prompt, "
        "or an assistant_model."
    )


def keep_decision(arguments: Mapping[str, Any], output: Any, decision: Any) -> None:
    """Let the cache that a forward was given, or made, know what was decided at its prompt."""
    made = output.values() if isinstance(output, Mapping) else output
    for cache in filter(_is_cache, [*arguments.values(), *made]):
        setattr(cache, _KEPT, decision)


def tokens_of(mask: Any, length: int) -> Tensor | None:
    """The last ``length`` columns of a mask of tokens [B, S].

    Raises:
        ValueError: it is of another form.
    """
    if mask is None:
        return None
    if getattr(mask, "ndim", None) != 2:
        shape = tuple(getattr(mask, "shape", ())) or type(mask).__name__
        raise ValueError(
            f"attention_mask must be [B, S] where a model decides by the prompt, got {shape}, as "
            "static caches and generate_batch make it; generate without cache_implementation."
        )
    return mask[:, -length:]


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
