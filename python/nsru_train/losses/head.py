"""Per-token NLL and KL of a language-model head without logits of [T, vocab].

The head is frozen while unlearning, and the gradient of a token's loss is linear in the gradient
that arrives for that token. So the forward pass, which has the token's probabilities at hand,
computes the hidden gradient for an incoming gradient of one; backward only scales its rows. That is
two GEMMs instead of the three of a recomputing backward, and nothing but one [T, D] tensor is kept.

Shape suffixes here: T tokens with a label, C tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits of one chunk: 128 MiB in fp32, 1024 rows at a vocabulary of 32k, 256 rows at 128k. From 184
# rows on, a chunk's GEMM takes longer than reading the head (H200: 790 TFLOP/s, 4.3 TB/s).
CHUNK_ELEMENTS = 1 << 25


def token_nll(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """-log softmax(cap(scale · (hidden · head_weightᵀ + head_bias)))[targets], one value per token.

    cap(z) is softcap · tanh(z / softcap), or z without a softcap. Differentiable once, in `hidden`,
    `head_weight` and `head_bias`.

    Args:
        hidden: [T, D], output of the backbone after its final norm; any float dtype.
        head_weight: [V, D].
        targets: [T] long, the token that each row predicts, in [0, V).
        head_bias: [V] or None.
        chunk: rows whose logits exist at one time; default: as many as make 2^25 logits.
        logit_softcap: positive bound of the logits (Gemma), or None.
        logit_scale: factor on the logits (Cohere, Granite).

    Returns:
        [T], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not fit together.
        TypeError: targets are not integers.
    """
    _check("token_nll", hidden, head_weight, head_bias, chunk, logit_softcap)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_nll: targets must be [T={hidden.shape[0]}] like hidden's rows, got "
            f"{tuple(targets.shape)}."
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"token_nll: targets must be torch.int64 token ids, got {targets.dtype}.")
    head = Head(logit_softcap, logit_scale, _chunk_rows(chunk, head_weight.shape[0]))
    return _TokenNLL.apply(hidden, head_weight, head_bias, targets, head, torch.is_grad_enabled())


def token_kl(
    hidden_base: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """KL(base ‖ model) over the vocabulary for each token; both have the same frozen head.

    Args:
        hidden_base: [T, D] from the backbone with adapters off; gets no gradient.
        hidden: [T, D] from the backbone with adapters on.
        head_weight, head_bias, chunk, logit_softcap, logit_scale: as in `token_nll`, frozen.

    Returns:
        [T], fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        ValueError: shapes do not fit together, or the head requires a gradient.
    """
    _check("token_kl", hidden, head_weight, head_bias, chunk, logit_softcap)
    if hidden_base.shape != hidden.shape:
        raise ValueError(
            f"token_kl: hidden_base must have hidden's shape {tuple(hidden.shape)}, got "
            f"{tuple(hidden_base.shape)}."
        )
    if torch.is_grad_enabled() and (
        head_weight.requires_grad or (head_bias is not None and head_bias.requires_grad)
    ):
        raise ValueError(
            "token_kl: the head must be frozen (requires_grad=False): with a trained head, base "
            "and model differ in it."
        )
    head = Head(logit_softcap, logit_scale, _chunk_rows(chunk, head_weight.shape[0]))
    return _TokenKL.apply(
        hidden_base, hidden, head_weight, head_bias, head, torch.is_grad_enabled()
    )


def token_score(
    score: Callable[..., Tensor],
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    hidden_base: Tensor | None = None,
    head_bias: Tensor | None = None,
    chunk: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """score(logits, targets) of each token, for losses that NLL and KL do not make up.

    Some more [C, V] exist than in `token_nll`: what autograd keeps of ``score``.

    Args:
        score: (logits [C, V] fp32 or fp64, targets [C] long) -> [C], differentiable, each token by
            itself. With hidden_base it gets the base's logits [C, V] as a third argument. Masked
            entries of a vocabulary have the logit -inf.
        hidden_base: [T, D] from the backbone with adapters off; gets no gradient.
        hidden, head_weight, targets, head_bias, chunk, logit_softcap, logit_scale: as in
            `token_nll`; the head is frozen.

    Returns:
        [T], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not fit together.
    """
    _check("token_score", hidden, head_weight, head_bias, chunk, logit_softcap)
    head = Head(logit_softcap, logit_scale, _chunk_rows(chunk, head_weight.shape[0]))
    return _TokenScore.apply(
        hidden, hidden_base, head_weight, head_bias, targets, score, head, torch.is_grad_enabled()
    )


@dataclass(frozen=True)
class Head:
    """The way from head_weight · hidden to logits, and the rows of them that exist at one time."""

    softcap: float | None
    scale: float
    rows: int

    def logits(self, h_CD: Tensor, w_VD: Tensor, b_V: Tensor | None) -> Tensor:
        """[C, V] in fp32 or fp64, before the softcap."""
        z_CV = torch.nn.functional.linear(h_CD.to(w_VD.dtype), w_VD, b_V)
        z_CV = z_CV.to(_accumulator(z_CV.dtype))
        return z_CV.mul_(self.scale) if self.scale != 1.0 else z_CV

    def bound(self, z_CV: Tensor) -> Tensor:
        """Apply the softcap, in the memory of the argument."""
        return z_CV if self.softcap is None else z_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z_CV: Tensor) -> Tensor | None:
        """d logits / d (head output), given bounded logits; None for 1."""
        if self.softcap is None:
            return None
        return (z_CV / self.softcap).square_().neg_().add_(1.0)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, grad_enabled):
        need_hidden, need_weight, need_bias = (
            grad_enabled and need for need in ctx.needs_input_grad[:3]
        )
        nll_T = hidden.new_empty(hidden.shape[0], dtype=_accumulator(hidden.dtype))
        unit_TD = torch.empty_like(hidden if need_hidden else hidden[:0])
        for part in _chunks(hidden.shape[0], head.rows):
            nll_T[part], delta_CV = _nll_chunk(
                head, hidden[part], weight, bias, targets[part], need_hidden
            )
            if need_hidden:
                unit_TD[part] = delta_CV.to(weight.dtype) @ weight
            del delta_CV
        ctx.head = head
        ctx.save_for_backward(
            unit_TD, *((hidden, weight, bias, targets) if need_weight or need_bias else ())
        )
        return nll_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_T):
        unit_TD, *rest = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = (unit_TD * grad_T.unsqueeze(1)).to(unit_TD.dtype)
        if rest:
            d_weight, d_bias = _head_gradients(ctx.head, grad_T, *rest)
        return d_hidden, d_weight, d_bias, None, None, None


def _nll_chunk(head, h_CD, weight, bias, targets_C, need_delta):
    """NLL of a chunk and, on request, its derivative in the head's output [C, V]."""
    z_CV = head.bound(head.logits(h_CD, weight, bias))
    slope_CV = head.slope(z_CV) if need_delta else None
    target_C1 = z_CV.gather(1, targets_C.unsqueeze(1))
    p_CV, lse_C1 = _softmax_(z_CV)
    nll_C = (lse_C1 - target_C1).squeeze(1)
    if not need_delta:
        return nll_C, None
    p_CV.scatter_add_(1, targets_C.unsqueeze(1), p_CV.new_full(target_C1.shape, -1.0))
    return nll_C, _chain_(p_CV, slope_CV, head.scale)


def _head_gradients(head, grad_T, hidden, weight, bias, targets):
    """dW and db of a trained head, from chunks computed again, summed in at least fp32."""
    acc = _accumulator(weight.dtype)
    d_weight = torch.zeros_like(weight, dtype=acc) if weight.requires_grad else None
    d_bias = torch.zeros_like(bias, dtype=acc) if bias is not None and bias.requires_grad else None
    for part in _chunks(hidden.shape[0], head.rows):
        _, delta_CV = _nll_chunk(head, hidden[part], weight, bias, targets[part], True)
        delta_CV.mul_(grad_T[part].unsqueeze(1))
        if d_weight is not None:
            d_weight.addmm_(delta_CV.t(), hidden[part].to(acc))
        if d_bias is not None:
            d_bias.add_(delta_CV.sum(0))
    return (
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(bias.dtype),
    )


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_base, hidden, weight, bias, head, grad_enabled):
        need = grad_enabled and ctx.needs_input_grad[1]
        kl_T = hidden.new_empty(hidden.shape[0], dtype=_accumulator(hidden.dtype))
        unit_TD = torch.empty_like(hidden if need else hidden[:0])
        for part in _chunks(hidden.shape[0], head.rows):
            base_CV = head.bound(head.logits(hidden_base[part], weight, bias))
            z_CV = head.bound(head.logits(hidden[part], weight, bias))
            slope_CV = head.slope(z_CV) if need else None
            gap_CV = gap(base_CV, z_CV)
            q_CV, base_lse_C1 = _softmax_(base_CV)
            p_CV, lse_C1 = _softmax_(z_CV)
            kl_T[part] = (gap_CV.mul_(q_CV).sum(1, keepdim=True) - base_lse_C1 + lse_C1).squeeze(1)
            if need:
                unit_TD[part] = (
                    _chain_(p_CV.sub_(q_CV), slope_CV, head.scale).to(weight.dtype) @ weight
                )
        ctx.save_for_backward(unit_TD)
        return kl_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_T):
        (unit_TD,) = ctx.saved_tensors
        return None, (unit_TD * grad_T.unsqueeze(1)).to(unit_TD.dtype), None, None, None, None


class _TokenScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, hidden_base, weight, bias, targets, score, head, grad_enabled):
        need = grad_enabled and ctx.needs_input_grad[0]
        score_T = hidden.new_empty(hidden.shape[0], dtype=_accumulator(hidden.dtype))
        unit_TD = torch.empty_like(hidden if need else hidden[:0])
        for part in _chunks(hidden.shape[0], head.rows):
            z_CV = head.bound(head.logits(hidden[part], weight, bias))
            slope_CV = head.slope(z_CV) if need else None
            base = () if hidden_base is None else (hidden_base[part],)
            base = tuple(head.bound(head.logits(h_CD, weight, bias)) for h_CD in base)
            with torch.set_grad_enabled(need):
                values_C = score(z_CV.requires_grad_(need), targets[part], *base)
                score_T[part] = values_C.detach()
                total = values_C.sum()
            if need:
                (delta_CV,) = torch.autograd.grad(total, z_CV)
                unit_TD[part] = _chain_(delta_CV, slope_CV, head.scale).to(weight.dtype) @ weight
        ctx.save_for_backward(unit_TD)
        return score_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_T):
        (unit_TD,) = ctx.saved_tensors
        d_hidden = (unit_TD * grad_T.unsqueeze(1)).to(unit_TD.dtype)
        return d_hidden, None, None, None, None, None, None, None


def gap(base: Tensor, other: Tensor) -> Tensor:
    """base - other, and 0 where base is -inf: a masked vocabulary row, of probability 0."""
    return (base - other).masked_fill_(base == -torch.inf, 0.0)


def _softmax_(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in the memory of its argument, and the log-sum-exp [C, 1]."""
    top_C1 = z_CV.amax(1, keepdim=True)
    p_CV = z_CV.sub_(top_C1).exp_()
    sum_C1 = p_CV.sum(1, keepdim=True)
    return p_CV.div_(sum_C1), sum_C1.log_().add_(top_C1)


def _chain_(delta_CV: Tensor, slope_CV: Tensor | None, scale: float) -> Tensor:
    if slope_CV is not None:
        delta_CV.mul_(slope_CV)
    return delta_CV.mul_(scale) if scale != 1.0 else delta_CV


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_rows(chunk: int | None, vocab: int) -> int:
    return chunk if chunk is not None else max(1, CHUNK_ELEMENTS // max(1, vocab))


def _chunks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _check(op: str, hidden, head_weight, head_bias, chunk, logit_softcap) -> None:
    if hidden.dim() != 2:
        raise ValueError(
            f"{op}: hidden must be [T, D], got {tuple(hidden.shape)}. Flatten batch and time first."
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: head_weight must be [V, D={hidden.shape[1]}] like hidden's last dimension, "
            f"got {tuple(head_weight.shape)}."
        )
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ValueError(
            f"{op}: head_bias must be [V={head_weight.shape[0]}], got {tuple(head_bias.shape)}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk must be at least 1 row, got {chunk}.")
    if logit_softcap is not None and logit_softcap <= 0:
        raise ValueError(f"{op}: logit_softcap must be positive or None, got {logit_softcap}.")
