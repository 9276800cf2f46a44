"""Projected adapters, computed once per optimizer step for all adapters of a model, never stale.

A projection is kept with what it came from: identity, storage and version counter of every A and of
the basis, and the number of optimizer steps taken since (some optimizers write through ``.data``,
which bumps no version counter). A hand edit through ``.data`` is seen by neither; after one,
``NSRULinear.invalidate`` is needed.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from nsru_kernels.nn.sharded import comes_and_goes, held, in_parts, refuse_shards
from nsru_kernels.ops.project.autograd import project_groups

if TYPE_CHECKING:
    from nsru_kernels.nn.group import LinearGroup


Variables = dict[int, tuple[tuple, float, Tensor]]


class Projected(NamedTuple):
    """A group's projected adapters.

    Attributes:
        key: `projection_key` of what they came from.
        sources: what the key names, kept alive, so that nothing new gets their identities.
        value: Ā [ΣR, K], the members' on top of each other.
        variables: position of a member → (its own key, s, s times its rows as a variable of the
            graph); empty before it is called with few tokens.
    """

    key: tuple
    sources: tuple[Tensor | None, ...]
    value: Tensor
    variables: Variables


class _Steps:
    """The optimizer steps of this process, counted while there is a cache that needs them."""

    def __init__(self) -> None:
        self.count = 0
        self._watchers = 0
        self._hook: RemovableHandle | None = None

    def watch(self, cache: object) -> None:
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._add)
        self._watchers += 1
        weakref.finalize(cache, self._leave).atexit = False

    def _add(self, *_) -> None:
        self.count += 1

    def _leave(self) -> None:
        self._watchers -= 1
        if not self._watchers and self._hook is not None:
            self._hook.remove()
            self._hook = None


steps = _Steps()


class Projections:
    """Keeps the projected adapters of a set of groups current; one stale group refreshes all.

    Each group holds its own, Ā of its members on top of each other in one dtype.
    """

    def __init__(self) -> None:
        # In the order of the model, so that a copy of it rounds alike.
        self._groups: weakref.WeakKeyDictionary[LinearGroup, None] = weakref.WeakKeyDictionary()
        steps.watch(self)

    def __reduce__(self):
        # A copied or unpickled model shares one empty cache; its groups add themselves.
        return Projections, ()

    def add(self, group: LinearGroup) -> None:
        """Project the adapters of ``group`` together with those of the others."""
        self._groups[group] = None

    def clear(self) -> None:
        """Forget every projection; the next forward projects again."""
        for group in list(self._groups):
            group.projected = None

    def refresh(self, asked: LinearGroup, dtype: torch.dtype) -> Projected:
        """Project ``asked`` in ``dtype``, and with it every other group that needs it too."""
        for module in asked.modules():
            refuse_shards(module)
        stale = [g for g in self._groups if g is asked or _stale_alike(asked, g, dtype)]
        adapters = [tuple([held(m, "lora_A") for m in group.modules()]) for group in stale]
        bases = [group.modules()[0].basis for group in stale]
        based = [(a, basis) for a, basis in zip(adapters, bases, strict=True) if basis is not None]
        # Not in inference mode, even when asked there: a later training step saves the projection
        # for backward.
        with torch.inference_mode(False), torch.no_grad():
            projected = iter(project_groups(based, dtype, asked.backend) if based else ())
            for group, lora_as, basis in zip(stale, adapters, bases, strict=True):
                group.projected = Projected(
                    projection_key(dtype, lora_as, basis),
                    (*lora_as, basis),
                    _stack(lora_as, dtype) if basis is None else next(projected),
                    {},
                )
                if group is asked:
                    result = group.projected
        return result


def _stack(lora_as: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Plain LoRA: A_i on top of each other, in memory of their own."""
    return torch.cat([a.to(dtype) for a in lora_as])


def projection_key(dtype: torch.dtype, lora_as: tuple[Tensor, ...], basis: Tensor | None) -> tuple:
    """All that a projection and the way of its gradients depend on, as far as PyTorch counts it."""
    key: list = [dtype, steps.count]
    for tensor in lora_as if basis is None else (*lora_as, basis):
        version = 0 if tensor.is_inference() else tensor._version
        key += (id(tensor), tensor.data_ptr(), version, tensor.requires_grad)
    return tuple(key)


def _stale_alike(asked: LinearGroup, other: LinearGroup, dtype: torch.dtype) -> bool:
    """True where ``other`` needs projecting too, in a dtype it is used with, in this launch."""
    if not _alike(asked, other):
        return False
    if other.projected is None:
        return True
    members = other.modules()
    key = other.projected.key
    lora_as, basis = tuple(held(m, "lora_A") for m in members), members[0].basis
    return key[0] == dtype and key != projection_key(dtype, lora_as, basis)


def _alike(asked: LinearGroup, other: LinearGroup) -> bool:
    """True where both can be projected in one launch."""
    members = other.modules()
    if not members or other.backend != asked.backend:
        return False
    device, basis = held(asked.modules()[0], "lora_A").device, members[0].basis
    for module in members:
        a_RK = held(module, "lora_A")
        # FSDP and ZeRO hold shards of A, or nothing, until its layer is called.
        if type(a_RK) not in (Tensor, nn.Parameter) or a_RK.device != device:
            return False
        if in_parts(module) or comes_and_goes(a_RK) or a_RK.is_inference():
            return False
    return basis is None or basis.device == device
