"""``nn.Linear`` with a low-rank update confined to the null space of a retain subspace."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsru_kernels.checks import check_range
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.dispatch.precision import full_float32
from nsru_kernels.nn.group import LinearGroup
from nsru_kernels.nn.projections import Projections
from nsru_kernels.nn.sharded import gathering, shards_of
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.ops.project import project_adapter


class NSRULinear(nn.Module):
    """y = x Wᵀ + b + (alpha/rank) · dropout(x) Āᵀ Bᵀ with Ā = A (I - U Uᵀ); W and b frozen.

    ``lora_A`` [R, K] starts as in PEFT (Kaiming uniform) and ``lora_B`` [N, R] at zero, both
    float32, so the module starts as its frozen linear. Between calls it keeps Ā, computed again
    whenever A or the basis changed, and in a group the outputs that its members have yet to take.
    A step of any ``torch.optim.Optimizer`` counts as a change. PyTorch counts neither edits through
    ``.data``, as in a training loop by hand, nor what collectives such as ``dist.broadcast`` and
    ``dist.all_reduce`` write: call `invalidate` of one of the model's modules after them.

    Args:
        in_features: K.
        out_features: N.
        rank: R ≥ 1.
        alpha: the update is scaled by alpha / rank.
        basis: U [K, Q] or a ``RetainSubspace``. None: plain LoRA.
        bias: whether there is a bias.
        dropout: LoRA dropout on x. With p > 0 the null-space property holds in expectation only.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Raises:
        ValueError: rank < 1, alpha NaN or infinite, dropout outside [0, 1], unknown backend, a
            basis of another size, or one with NaN or infinite values.
        TypeError: basis is neither of the two.

    Examples:
        >>> layer = NSRULinear.from_linear(nn.Linear(32, 16), rank=4, alpha=8)
        >>> layer(torch.randn(2, 32)).shape
        torch.Size([2, 16])
    """

    bias: nn.Parameter | None
    _unmerged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float,
        basis: Tensor | RetainSubspace | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        rank = check_range("NSRULinear: rank", rank, "must be ≥ 1", whole=True)
        alpha = check_range("NSRULinear: alpha", alpha, "must be a finite number")
        dropout = check_range("NSRULinear: dropout", dropout, "must be in [0, 1]")
        requested_backend(backend)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.dropout, self.backend = rank, alpha, dropout, backend
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._freeze()
        self._make_adapter(device)
        self.enabled = True
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self._set_basis(basis)
        self.join(LinearGroup(Projections()))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        *,
        alpha: float,
        basis: Tensor | RetainSubspace | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> NSRULinear:
        """Wrap a linear layer: its weight and bias are taken over, not copied, and frozen."""
        device = linear.weight.device
        module = cls(
            linear.in_features,
            linear.out_features,
            rank,
            alpha=alpha,
            bias=False,
            dropout=dropout,
            device="meta",
            backend=backend,
        )
        module._make_adapter(device)
        module._set_basis(basis)
        module.weight, module.bias = linear.weight, linear.bias
        module._freeze()
        return module.train(linear.training)

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weight."""
        return self.weight.dtype

    @property
    def basis(self) -> Tensor | None:
        """U [K, Q], or None for plain LoRA."""
        return self._subspace[0]._buffers["basis"] if self._subspace else None

    @property
    def subspace(self) -> RetainSubspace | None:
        """The holder of the basis: this module's own child, or that of the one that saves it."""
        return self._subspace[0] if self._subspace else None

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
        """W, b, A, B and s as they are at this moment."""
        # Without nn.Module's search for attributes, and by get: see sharded.held.
        get, scaling = self._parameters.get, self.alpha / self.rank
        weight, a_RK = get("weight"), get("lora_A")
        if weight is None or a_RK is None:  # FSDP puts plain tensors in their places
            return self.weight, self.bias, self.lora_A, self.lora_B, scaling
        return weight, get("bias"), a_RK, get("lora_B"), scaling  # type: ignore[return-value]

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _make_adapter(self, device: torch.device | str | None, rows: int | None = None) -> None:
        rows = self.rank if rows is None else rows
        # float32 whatever the default dtype: transformers changes that while it loads a model.
        fp32 = torch.float32
        a_RK = torch.empty(rows, self.in_features, device=device, dtype=fp32)
        b_NR = torch.zeros(self.out_features, rows, device=device, dtype=fp32)
        self.lora_A, self.lora_B = nn.Parameter(a_RK), nn.Parameter(b_NR)
        self.reset_adapter()

    def _set_basis(self, basis: Tensor | RetainSubspace | None) -> None:
        if isinstance(basis, Tensor):
            basis = RetainSubspace(basis)
        elif isinstance(basis, RetainSubspace):
            basis = basis.share()
        elif basis is not None:
            raise TypeError(
                f"NSRULinear: basis must be a tensor [K={self.in_features}, Q] or a "
                f"RetainSubspace, got {type(basis).__name__}."
            )
        self.hold(None if basis is None else basis.to(self.lora_A.device))

    def hold(self, subspace: RetainSubspace | None) -> None:
        """Project by ``subspace`` itself, which linears with the same input share.

        Raises: ValueError: it is of another size.
        """
        if subspace is not None and subspace.in_features != self.in_features:
            raise ValueError(
                f"NSRULinear: basis must be [K={self.in_features}, Q] like in_features, "
                f"got {tuple(subspace.basis.shape)}. Was it estimated for another layer?"
            )
        # In a tuple it is no child: only its first user registers (and saves) it.
        self._subspace = () if subspace is None else (subspace,)
        if subspace is not None and not subspace.owned:
            subspace.owned = True
            self.subspace = subspace  # type: ignore[misc] # registers a child

    def join(self, group: LinearGroup) -> None:
        """Be computed with the members of ``group``, which read the same input."""
        self.group, self._position = group, group.add(self)

    def invalidate(self) -> None:
        """Project the model's adapters again, after edits of A or U that PyTorch does not count."""
        self.group.projections.clear()

    def reset_adapter(self) -> None:
        """A Kaiming uniform, B zero: the module equals its frozen linear again."""
        if self.lora_A.is_meta:
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear names it
        """y [..., N] of x [..., K], in x's dtype."""
        if self.enabled and self._buffers["_unmerged_weight"] is None:
            return self.group.call(self, input)
        weight = self.weight
        if not self.enabled and self._unmerged_weight is not None:
            weight = self._unmerged_weight
        return F.linear(input, weight, self.bias)

    @torch.no_grad()
    @gathering
    def projected_adapter(self) -> Tensor:
        """Ā [R, K] in float32 (float64 of float64): what a plain LoRA adapter has as its A.

        Rounded to 16 bits, as A may be, it would leak into the retain subspace again.
        """
        a_RK = self.lora_A.to(torch.promote_types(self.lora_A.dtype, torch.float32))
        return project_adapter(a_RK, self.basis, backend=self.backend).clone()

    @torch.no_grad()
    @gathering
    def delta_weight(self) -> Tensor:
        """s B Ā [N, K] in float32 (float64 for float64 adapters)."""
        a_RK = self.projected_adapter()
        return self._update(a_RK, self.lora_B.to(a_RK.dtype))

    def _update(self, a_RK: Tensor, b_NR: Tensor) -> Tensor:
        with torch.autocast(a_RK.device.type, enabled=False), full_float32(a_RK.device):
            return self.scaling * (b_NR @ a_RK)

    @torch.no_grad()
    @gathering
    def merged_weight(self) -> Tensor:
        """W + s B Ā, summed in float32 (float64 for a float64 W), rounded once to W's dtype; W
        itself once it is merged.

        Raises: ValueError: it holds NaN or infinite values.
        """
        if self.merged:
            return self.weight.detach()
        return finite_weight(added(self.delta_weight(), self.weight).to(self.dtype))

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype) -> nn.Module:
        """The plain linear with the update in it for good: W itself is written to, in its dtype."""
        self.weight.copy_(self.merged_weight())
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment] # None without a bias
        return linear.train(self.training)

    @torch.no_grad()
    @gathering
    def leakage(self) -> float:
        """‖Ā U‖_F / ‖A‖_F, Ā rounded to weight's dtype, then in float64; 0.0 without a basis."""
        if self.basis is None:
            return 0.0
        a_RK = self.projected_adapter().to(self.dtype).double()
        norm = self.lora_A.double().norm()
        return float((a_RK @ self.basis.double()).norm() / norm) if norm else 0.0

    @property
    def merged(self) -> bool:
        """True while the update is inside ``weight``."""
        return self._unmerged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """W ← round(W + s B Ā), summed in float32. Keeps a copy of W: ``unmerge`` is exact."""
        if self.merged:
            return
        if shards_of(self):
            raise ValueError(
                "NSRULinear: weight is sharded, and a copy of it for unmerge() would be too much; "
                "merge_adapters(model) merges for good, adapters_disabled(model) shows the base."
            )
        merged = self.merged_weight()
        self._unmerged_weight = self.weight.detach().clone()
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight from before ``merge`` back, bit by bit."""
        if self._unmerged_weight is not None:
            self.weight.copy_(self._unmerged_weight)
            self._unmerged_weight = None

    def extra_repr(self) -> str:
        basis = self.basis
        q = 0 if basis is None else basis.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, alpha={self.alpha}, "
            f"retain_rank={q}, dropout={self.dropout}"
        )

    def __setattr__(self, name, value):
        # FSDP gathers into the same tensor again, and keeps its version: Ā is made anew each time.
        if name == "lora_A" and (group := self.__dict__.get("group")) is not None:
            group.projected = None
        super().__setattr__(name, value)

    def __setstate__(self, state):
        super().__setstate__(state)
        copied = any(m.lora_A is self.lora_A for m in self.group.modules())
        self.join(LinearGroup(Projections()) if copied else self.group)

    def _apply(self, fn, recurse=True):
        # Two casts can bring an address back, and neither is counted as an edit.
        self.invalidate()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:
            destination[prefix + "weight"] = self._unmerged_weight

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)


def added(delta: Tensor, weight: Tensor) -> Tensor:
    """delta + W in the wider of their dtypes, in delta's own memory where that is delta's."""
    return delta.to(torch.promote_types(delta.dtype, weight.dtype)).add_(weight)


def finite_weight(merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise ValueError(
            f"W + s B Ā holds NaN or infinite values in {merged.dtype}: the adapter diverged "
            "or is damaged, or the sum overflows. Train again, or cast the model first."
        )
    return merged


# Open blocks of `adapters_disabled` around a module, and `enabled` before the first of them.
_disabled: weakref.WeakKeyDictionary[NSRULinear, tuple[int, bool]] = weakref.WeakKeyDictionary()
_beginning_or_ending = threading.Lock()


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """In the block every ``NSRULinear`` of ``model`` acts as its frozen linear, merged or not.

    In every thread of the process: another one that calls the model meanwhile gets base outputs,
    until the last of several blocks ends, in whatever order they do.
    With gradient checkpointing use it in ``torch.no_grad()``: what a backward outside of the block
    computes again has the adapters.
    A copy of the model that is made in the block has them off for good.

    Args:
        model: any module; what is inside and no ``NSRULinear`` is left alone.
    """
    modules = [m for m in model.modules() if isinstance(m, NSRULinear)]
    with _beginning_or_ending:
        for module in modules:
            blocks, before = _disabled.get(module, (0, module.enabled))
            _disabled[module] = blocks + 1, before
            module.enabled = False
    try:
        yield
    finally:
        with _beginning_or_ending:
            for module in modules:
                blocks, before = _disabled.pop(module)
                if blocks > 1:
                    _disabled[module] = blocks - 1, before
                else:
                    module.enabled = before
