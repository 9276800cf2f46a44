"""Modules whose parameters ``fully_shard`` has spread over ranks, whole for a while, one by one.

What holds here for many ranks is a collective call: every rank has to make it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def is_shard(tensor: Tensor | None) -> bool:
    """True for a DTensor, of which this rank holds a part."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Any) -> Any:
    """A DTensor gathered on every rank; anything else as it is."""
    if not is_shard(tensor):
        return tensor
    # Shards that were offloaded to the CPU travel as those of the mesh's device.
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def shards_like(tensor: Tensor, like: Any) -> Any:
    """``tensor`` as a DTensor that is spread as ``like`` is, if that is one; every rank has all."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    copies = DTensor.from_local(tensor.to(mesh.device_type), mesh, everywhere, run_check=False)
    return copies.redistribute(placements=like.placements).to(like.device)


def shards_of(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """(the dict that holds it, its name there, itself) for every sharded parameter."""
    return [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if is_shard(parameter)
    ]


def reshard(model: nn.Module) -> None:
    """Give up what ``fully_shard`` keeps whole after a forward, as the root's own parameters."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def refuse_shards(module: nn.Module) -> None:
    """Raise TypeError where a forward would multiply by shards."""
    for _, name, _ in shards_of(module):
        raise TypeError(
            f"NSRULinear: {name} is a DTensor while the module is called: it is tensor parallel, "
            "which is not supported, or its layer was called past fully_shard. Call the model that "
            "fully_shard was given."
        )


def held(module: nn.Module, name: str) -> Tensor:
    """A parameter as the module has it, also where that is a part, or nothing.

    By ``[]`` or as an attribute ZeRO-3's dictionary would gather it, on the ranks that ask.
    """
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter  # FSDP1's are attributes


def comes_and_goes(parameter: Tensor) -> bool:
    """True where ZeRO-3 gathers it for calls of its own module and lets it go after them."""
    return hasattr(parameter, "ds_id")


def in_parts(module: Any) -> bool:
    """True where FSDP1 or ZeRO-3 holds A in parts that are no DTensors, or nothing of it."""
    shape, k = held(module, "lora_A").shape, module.in_features
    return len(shape) != 2 or shape[1] != k or not shape[0] or shape[0] % module.rank > 0


def refuse_parts(name: str, module: Any) -> None:
    """Raise ValueError where A is ``in_parts``."""
    if in_parts(module):
        raise ValueError(
            f"save_lora_adapter: {name}: lora_A must be [R={module.rank}, "
            f"K={module.in_features}], got {tuple(module.lora_A.shape)}, a part of FSDP1 or "
            "ZeRO-3. Call it inside FullyShardedDataParallel.summon_full_params(model) or "
            "deepspeed.zero.GatheredParameters of what is trained, or shard by fully_shard."
        )


@contextlib.contextmanager
def gathered(module: nn.Module, *, write: bool = False) -> Iterator[None]:
    """In the block the sharded parameters of ``module`` are whole, on every rank.

    Args:
        write: what the block did to them goes into the shards, each rank its own part.
    """
    shards = shards_of(module)
    try:
        for holder, name, shard in shards:
            holder[name] = nn.Parameter(whole(shard), requires_grad=shard.requires_grad)
        yield
        for holder, name, shard in shards if write else ():
            with torch.no_grad():
                shard.copy_(shards_like(holder[name].detach(), shard))
    finally:
        for holder, name, shard in shards:
            holder[name] = shard


def gathering(method: Function) -> Function:
    """A method of a module that reads its parameters whole; every rank has to call it."""

    @functools.wraps(method)
    def whole(self, *args, **kwargs):
        with gathered(self):
            return method(self, *args, **kwargs)

    return whole  # type: ignore[return-value]


@contextlib.contextmanager
def on_first_rank(model: nn.Module) -> Iterator[bool]:
    """True in the block on one rank of those that share a sharded model; always if it is not.

    Ranks leave it together. Raises: RuntimeError: on the others, where the block failed on one.
    """
    reshard(model)
    shard = next((shard for _, _, shard in shards_of(model)), None)
    if shard is None:
        yield True
        return
    mesh, error = shard.device_mesh, None
    try:
        yield not any(mesh.get_coordinate())
    except Exception as caught:  # told after the others know
        error = caught
    failed = torch.tensor(float(error is not None), device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another rank of the sharded model failed; its error says why.")
