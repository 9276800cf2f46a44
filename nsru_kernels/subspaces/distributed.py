"""Merging the sketches of the ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nsru_kernels.subspaces.factors import rotate

if TYPE_CHECKING:
    from nsru_kernels.subspaces.sketch import RetainSketch


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be for a collective of `group`: NCCL carries CUDA tensors only."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_reduce_sketch(sketch: RetainSketch, group: dist.ProcessGroup | None) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_reduce: no process group; start with torchrun and call init_process_group, or "
            "leave all_reduce out on a single process."
        )
    device = communication_device(group)
    tokens = _agree(sketch, group, device)
    if dist.get_world_size(group) == 1 or tokens == 0:
        return
    trace = torch.tensor(sketch.trace, dtype=torch.float64, device=device)
    dist.all_reduce(trace, group=group)
    if sketch.route == "covariance":
        moment_KK = sketch.moment().to(device)
        dist.all_reduce(moment_KK, group=group)
        sketch.restart_from_moment(moment_KK, trace.item(), tokens)
    else:
        factor_KL = _pad(sketch.factor().to(device), sketch.width)
        factor_KL = _reduce_tree(factor_KL, group)
        sketch.restart_from_factor(factor_KL, trace.item(), tokens)


def _agree(sketch: RetainSketch, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The tokens of all ranks together, after checking that their sketches fit."""
    mine = torch.tensor([sketch.in_features, sketch.width, sketch.tokens], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    shapes = [tuple(rank[:2].tolist()) for rank in everyone]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"all_reduce: ranks must hold sketches of one shape, got (in_features, width) = "
            f"{shapes}."
        )
    return sum(int(rank[2]) for rank in everyone)


def _reduce_tree(factor_KL: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Pairs shrink [F₁ F₂] to L columns, level by level; the root's result goes to every rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    peers = dist.get_process_group_ranks(group or dist.group.WORLD)
    theirs_KL = torch.empty_like(factor_KL)
    step = 1
    while step < size:
        if rank % (2 * step) == step:
            dist.send(factor_KL, peers[rank - step], group=group)
            break
        if rank + step < size:
            dist.recv(theirs_KL, peers[rank + step], group=group)
            width = factor_KL.shape[1]
            both_KF = torch.cat([factor_KL, theirs_KL], dim=1)
            factor_KL = _pad(rotate(both_KF)[:, :width], width)
        step *= 2
    dist.broadcast(factor_KL, peers[0], group=group)
    return factor_KL


def _pad(factor_KF: Tensor, width: int) -> Tensor:
    """Zero columns up to `width`, so that every message has one shape."""
    return torch.nn.functional.pad(factor_KF, (0, width - factor_KF.shape[1])).contiguous()
