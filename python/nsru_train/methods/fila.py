"""FILA: adapters that start as the part of each weight that matters most for what is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import nsru_kernels as nk
from nsru_kernels.nn.inputs import evaluating
from nsru_train.losses.nll import answer_nll
from nsru_train.quantized import refuse_wrapped

EPSILON = 1e-5
OVERSAMPLING = 8  # directions of the randomised SVD beyond the rank

Batches = Sequence[Mapping[str, Tensor]]


def start_with_fila(model: nn.Module, forget: Batches, retain: Batches) -> None:
    """Let the adapters of ``model`` begin as low-rank parts s B₀ A₀ of their weights.

    Each row of W counts by the root of its summed ratio of Fisher information, forget to retain.
    The paper takes s B₀ A₀ out of W. Here W stays, and A and B get as many rows and columns more,
    A₀ and -B₀, that are not trained: the model begins as it was, adapters that are off leave the
    base model, and the update is exported as plain LoRA of twice the rank.

    Args:
        model: its linears were swapped just now, their adapters are zero.
        forget, retain: batches of answers, as `answer_nll` takes them; of two each in the paper.

    Source: Cha et al. 2025, arXiv 2408.06621 (LoKU), and its public code.
    """
    refuse_wrapped(model, "fila")
    modules = [module for module in model.modules() if isinstance(module, nk.NSRULinear)]
    weights = [module.weight for module in modules]
    fisher = [squared_gradients(model, weights, batches) for batches in (forget, retain)]
    for module, of_forget_NK, of_retain_NK in zip(modules, *fisher, strict=True):
        importance_N = (of_forget_NK / (of_retain_NK + EPSILON)).sum(1).sqrt()
        a_RK, b_NR = low_rank_part(module.weight.float(), importance_N, module.rank, module.scaling)
        _begin_as(module, a_RK, b_NR)


def squared_gradients(
    model: nn.Module, weights: Sequence[Tensor], batches: Batches
) -> list[Tensor]:
    """Mean over ``batches``, by their answers' tokens, of the squared gradient of the mean NLL."""
    totals, tokens = [torch.zeros_like(w, dtype=torch.float32) for w in weights], 0
    trained = [w.requires_grad for w in weights]
    for weight in weights:
        weight.requires_grad_(True)
    with evaluating(model), nk.adapters_disabled(model), torch.enable_grad():
        for batch in tqdm(batches, "Fisher information", leave=False):
            nll_T, _ = answer_nll(model, batch)
            gradients = torch.autograd.grad(
                nll_T.mean(), weights, allow_unused=True, materialize_grads=True
            )
            for total, gradient in zip(totals, gradients, strict=True):
                total.add_(gradient.float().square(), alpha=len(nll_T))
            tokens += len(nll_T)
    for weight, before in zip(weights, trained, strict=True):
        weight.requires_grad_(before)
    return [total / tokens for total in totals]


def low_rank_part(
    w_NK: Tensor, importance_N: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R], scaling · B A nearest to W where its rows weigh ``importance_N``.

    Beyond the rank that W can have they are zero.
    """
    sketched = min(rank + OVERSAMPLING, *w_NK.shape)
    u_NS, s_S, v_KS = torch.svd_lowrank(importance_N.unsqueeze(1) * w_NK, q=sketched, niter=4)
    root_R = (s_S[:rank] / scaling).sqrt()
    b_NR = u_NS[:, :rank] * root_R / (importance_N + EPSILON).unsqueeze(1)
    missing = rank - len(root_R)
    return F.pad((v_KS[:, :rank] * root_R).T, (0, 0, 0, missing)), F.pad(b_NR, (0, missing))


@torch.no_grad()
def _begin_as(module: nk.NSRULinear, a_RK: Tensor, b_NR: Tensor) -> None:
    rank = module.rank
    module.rank, module.alpha = 2 * rank, 2 * module.alpha
    module.lora_A = nn.Parameter(torch.cat([a_RK, a_RK]).to(module.lora_A))
    module.lora_B = nn.Parameter(torch.cat([b_NR, -b_NR], 1).to(module.lora_B))
    module.lora_A.register_hook(lambda gradient: _first(gradient, rank, 0))
    module.lora_B.register_hook(lambda gradient: _first(gradient, rank, 1))
    module.invalidate()


def _first(gradient: Tensor, count: int, dim: int) -> Tensor:
    """The gradient of the first ``count`` entries along ``dim``, zero behind them."""
    kept = torch.zeros_like(gradient)
    kept.narrow(dim, 0, count).copy_(gradient.narrow(dim, 0, count))
    return kept
