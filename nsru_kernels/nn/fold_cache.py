"""Folded adapters, computed once per optimizer step for all adapters of a model and never stale.

A fold is remembered together with what it came from: identity, storage and version counter of A and
of the basis, and the number of optimizer steps taken in this process (some optimizers write through
``.data``, which bumps no version counter). On a CPU the adapter's values are compared too, so that
even a hand edit through ``.data`` is seen; on a GPU that would synchronise. After such an edit
there, or of a basis anywhere, ``FoldCache.clear`` is needed.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from nsru_kernels.ops.fold import project_adapters
from nsru_kernels.ops.fold.core import tensor_key
from nsru_kernels.ops.launch import capturing

if TYPE_CHECKING:
    from nsru_kernels.nn.linear import NSRULinear

_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Steps that optimizers took in this process."""
    return _optimizer_steps


class _Fold(NamedTuple):
    key: tuple
    parents: tuple[
        Tensor, ...
    ]  # kept alive, so that no new tensor can take over an identity in the key
    values: Tensor | None  # of A, on a CPU
    folded: Tensor


class FoldCache:
    """The folds of a set of ``NSRULinear``; one stale member refreshes all stale ones together."""

    def __init__(self) -> None:
        self._folds: weakref.WeakKeyDictionary[NSRULinear, _Fold | None] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self):
        # A copied or unpickled model shares one empty cache; its modules add themselves.
        return FoldCache, ()

    def add(self, module: NSRULinear) -> None:
        """Fold ``module`` together with the members so far."""
        self._folds[module] = None

    def clear(self) -> None:
        """Forget every fold; the next forward folds again."""
        for module in list(self._folds):
            self._folds[module] = None

    def folded(self, module: NSRULinear, dtype: torch.dtype) -> Tensor | None:
        """Ā of ``module`` in ``dtype``; None where the caller's graph has to fold it."""
        a_RK = module.lora_A
        if torch.compiler.is_compiling() or a_RK.is_inference() or a_RK.is_meta:
            return None
        if capturing(a_RK.device):
            return None
        fold = self._fresh_fold(module, dtype)
        if fold is None:
            self._refresh(module, dtype)
            fold = self._folds[module]
        assert fold is not None
        return fold.folded

    def _refresh(self, asked: NSRULinear, dtype: torch.dtype) -> None:
        stale = [asked]
        for other in self._folds:
            if other is not asked and self._stale_alike(asked, other, dtype):
                stale.append(other)
        # Not in inference mode, even when asked there: a later training step saves the fold for
        # backward.
        with torch.inference_mode(False), torch.no_grad():
            folds = project_adapters(
                [m.lora_A for m in stale], [m.basis for m in stale], backend=asked.backend
            )
            for module, folded in zip(stale, folds, strict=True):
                a_RK, basis_KQ = module.lora_A, module.basis
                self._folds[module] = _Fold(
                    _key(module, dtype),
                    (a_RK,) if basis_KQ is None else (a_RK, basis_KQ),
                    _values(a_RK),
                    folded.detach().to(dtype, copy=folded is a_RK),
                )

    def _stale_alike(self, asked: NSRULinear, other: NSRULinear, dtype: torch.dtype) -> bool:
        """Whether ``other`` needs a fold too, in a dtype it is used with, in the same launch."""
        fold = self._folds[other]
        if fold is not None and (fold.key[0] != dtype or self._fresh_fold(other, dtype)):
            return False
        return _together(asked, other)

    def _fresh_fold(self, module: NSRULinear, dtype: torch.dtype) -> _Fold | None:
        fold = self._folds.get(module)
        if fold is None or fold.key != _key(module, dtype):
            return None
        return fold if fold.values is None or torch.equal(fold.values, module.lora_A) else None


def _values(a_RK: Tensor) -> Tensor | None:
    return a_RK.detach().clone() if a_RK.device.type == "cpu" else None


def _key(module: NSRULinear, dtype: torch.dtype) -> tuple:
    basis = module.basis
    return (
        dtype,
        tensor_key(module.lora_A),
        None if basis is None else tensor_key(basis),
        _optimizer_steps,
    )


def _together(asked: NSRULinear, other: NSRULinear) -> bool:
    """Whether one launch can fold both."""
    return (
        other.backend == asked.backend
        and other.lora_A.device == asked.lora_A.device
        and not other.lora_A.is_inference()
        and (other.basis is None or other.basis.device == asked.lora_A.device)
    )
