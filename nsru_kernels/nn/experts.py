"""Adapters on fused experts: transformers' modules that hold a layer's experts in 3-D parameters.

Each of the two, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, is one linear of E weights,
and gets A and B for each expert. All experts share one retain subspace: that of the tokens that
reach the layer for ``gate_up_proj``, that of what is inside any of its experts for ``down_proj``.
So a retain token stays protected when another expert gets it, as happens once the layers below
have changed, one [K, Q] is held in place of E of them, and every token counts, where one of many
experts sees too few to fill a subspace. Routers are left alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nsru_kernels.nn.linear import NSRULinear, added, finite_weight
from nsru_kernels.nn.sharded import gathering
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.ops.grouped import Groups
from nsru_kernels.ops.linear import compute_dtype
from nsru_kernels.ops.project import project_adapter

# In the order of their registration, by which PEFT nests its wrappers.
_LINEARS = ("gate_up_proj", "up_proj", "down_proj")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_IMPLEMENTATION = "nsru"


class Routing:
    """The tokens of each expert: S pairs of a token and an expert, by expert.

    Args:
        experts_TC: the C experts that each of T tokens is sent to.
        num_experts: E.

    Attributes:
        order: [S], where each pair stands in the router's own order, by token.
        tokens: [S], the token of each pair.
        experts: [S], the expert of each pair.
        groups: the pairs of each expert.
    """

    def __init__(self, experts_TC: Tensor, num_experts: int) -> None:
        chosen = experts_TC.reshape(-1)
        self.shape = experts_TC.shape
        self.order = torch.argsort(chosen, stable=True)
        self.tokens = self.order // experts_TC.shape[1]
        self.experts = chosen[self.order]
        self.groups = Groups(self.experts, num_experts)

    def sum_by_token(self, y_SN: Tensor) -> Tensor:
        """[T, N]: what the experts of each token say, summed in the router's order."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        return y_SN[place].view(*self.shape, y_SN.shape[1]).sum(1)


class ExpertLinear(nn.Module):
    """One linear of all experts as it is in the model: the weights are those of ``experts``.

    Args:
        experts: what ``is_experts`` accepts.
        name: of the 3-D parameter.
    """

    weight: nn.Parameter

    def __init__(self, experts: Any, name: str) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple it is no child
        self.weight = experts._parameters[name]
        self.is_transposed = bool(experts.is_transposed)
        self.num_experts, *sizes = self.weight.shape
        self.in_features, self.out_features = sizes if self.is_transposed else sizes[::-1]
        self.train(experts.training)

    @property
    def experts(self) -> Any:
        return self._experts[0]

    def forward(self, x: Tensor, routing: Routing, in_order: bool = False) -> Tensor:
        """y [S, N] by expert; x is [S, K] too where ``in_order``, else [T, K]."""
        return _expert_linear(x, routing, in_order, self.weight, self.is_transposed)


class NSRUExpertLinear(NSRULinear):
    """y = x W_eᵀ + (alpha/rank) · x Ā_eᵀ B_eᵀ for each expert e, Ā_e = A_e (I - U Uᵀ), W frozen.

    Stands in the place of a 3-D parameter. ``weight`` is that parameter, [E, N, K] or [E, K, N].
    ``lora_A`` [E·R, K] and ``lora_B`` [N, R·E] hold the A_e on top of each other and the columns of
    the B_e in turn, as PEFT does. Computed by grouped GEMMs; beyond its operands a step holds x
    once and nothing of the size of W.

    Args:
        linear: where it comes from. The others are as for ``NSRULinear``.

    Raises:
        ValueError: as for ``NSRULinear``, or there is dropout: PEFT adds s B_e Ā_e to W_e and so
            refuses it.
    """

    def __init__(
        self,
        linear: ExpertLinear,
        rank: int,
        *,
        alpha: float,
        basis: Tensor | RetainSubspace | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        if dropout:
            raise ValueError(
                f"dropout must be 0 where experts are adapted, as in PEFT, got {dropout}; set it "
                "to 0, or exclude the experts."
            )
        k, n = linear.in_features, linear.out_features
        super().__init__(k, n, rank, alpha=alpha, bias=False, device="meta", backend=backend)
        self.num_experts, self.is_transposed = linear.num_experts, linear.is_transposed
        self._make_adapter(linear.weight.device, rows=linear.num_experts * self.rank)
        self._set_basis(basis)
        self.weight = linear.weight
        self._freeze()
        self.train(linear.training)
        _register()

    def forward(self, x: Tensor, routing: Routing, in_order: bool = False) -> Tensor:  # type: ignore[override]
        """y [S, N] by expert; x is [S, K] too where ``in_order``, else [T, K]."""
        weight, adapter = self.weight, None
        if not self.enabled:
            weight = weight if self._unmerged_weight is None else self._unmerged_weight
        elif not self.merged:
            adapter = self
        return _expert_linear(x, routing, in_order, weight, self.is_transposed, adapter)

    def projected(self, dtype: torch.dtype) -> Tensor:
        """Ā [E·R, K] in ``dtype``, without gradient; computed once per optimizer step."""
        if self.lora_A.is_inference():  # whose edits are not counted
            return project_adapter(self.lora_A, self.basis, backend=self.backend).to(dtype)
        return self.group.current(dtype, (self.lora_A,), self.basis).value

    def by_expert(self, a_RK: Tensor, b_NR: Tensor) -> tuple[Tensor, Tensor]:
        """(A [E, R, K], B [E, N, R]) of tensors like ``lora_A`` and ``lora_B``."""
        a_ERK = a_RK.view(self.num_experts, self.rank, self.in_features)
        return a_ERK, b_NR.view(self.out_features, self.rank, self.num_experts).permute(2, 0, 1)

    @torch.no_grad()
    @gathering
    def delta_weight(self) -> Tensor:
        """s B_e Ā_e, laid out as ``weight``, in float32 (float64 for float64 adapters)."""
        return torch.stack(list(self._deltas()))

    @torch.no_grad()
    @gathering
    def merged_weight(self) -> Tensor:
        """W_e + s B_e Ā_e, summed in float32 expert by expert, rounded once to W's dtype.

        Raises: ValueError: it holds NaN or infinite values.
        """
        if self.merged:
            return self.weight.detach()
        merged = torch.empty_like(self.weight)
        for own, weight, delta in zip(merged, self.weight, self._deltas(), strict=True):
            own.copy_(added(delta, weight))
        return finite_weight(merged)

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype) -> nn.Parameter:  # type: ignore[override]
        """The plain parameter with the update in it for good, in its own dtype."""
        weight = self.weight
        weight.copy_(self.merged_weight())
        assert isinstance(weight, nn.Parameter)
        return weight

    def _deltas(self) -> Iterator[Tensor]:
        a_RK = self.projected_adapter()
        a_ERK, b_ENR = self.by_expert(a_RK, self.lora_B.to(a_RK.dtype))
        for a_RK, b_NR in zip(a_ERK, b_ENR, strict=True):
            delta_NK = self._update(a_RK, b_NR)
            yield delta_NK.T if self.is_transposed else delta_NK

    def __setstate__(self, state):
        super().__setstate__(state)
        _register()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix[:-1]] = destination.pop(prefix + "weight")  # as in the base model


class _ExpertLinear(torch.autograd.Function):
    """Saves x as it came, so that what the experts share is held once, and S; W has no gradient."""

    @staticmethod
    def forward(ctx, x, routing, in_order, w_ENK, a_RK, lora_a, lora_b, basis, adapter):
        matmul = routing.groups.matmul
        x_SK = x if in_order else x[routing.tokens]
        y_SN = matmul(x_SK, w_ENK.mT)
        a_ERK = b_ENR = s_SR = None
        if adapter is not None:
            a_ERK, b_ENR = adapter.by_expert(a_RK, lora_b.to(x.dtype))
            b_ENR = b_ENR.contiguous()
            s_SR = matmul(x_SK, a_ERK.mT).contiguous()  # grouped_mm pads rows
            y_SN.add_(matmul(s_SR, b_ENR.mT), alpha=adapter.scaling)
        ctx.save_for_backward(x, w_ENK, a_ERK, b_ENR, s_SR, basis)
        ctx.routing, ctx.in_order, ctx.adapter = routing, in_order, adapter
        return y_SN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SN):
        x, w_ENK, a_ERK, b_ENR, s_SR, basis = ctx.saved_tensors
        routing, in_order, adapter = ctx.routing, ctx.in_order, ctx.adapter
        matmul, outer = routing.groups.matmul, routing.groups.outer
        dx = da_RK = db_NR = None
        if ctx.needs_input_grad[0]:
            dx = matmul(dy_SN, w_ENK)
        if adapter is not None:
            ds_SR = matmul(dy_SN, b_ENR).mul_(adapter.scaling)
            if dx is not None:
                dx.add_(matmul(ds_SR, a_ERK))
            x_SK = x if in_order else x[routing.tokens]
            da_RK = outer(ds_SR, x_SK).flatten(0, 1)
            da_RK = project_adapter(da_RK.to(adapter.lora_A.dtype), basis, backend=adapter.backend)
            db_ENR = outer(dy_SN, s_SR).mul_(adapter.scaling)
            db_NR = db_ENR.permute(1, 2, 0).flatten(1).to(adapter.lora_B.dtype)
        if dx is not None and not in_order:
            dx = routing.sum_by_token(dx)
        return dx, None, None, None, None, da_RK, db_NR, None, None


def _expert_linear(
    x: Tensor,
    routing: Routing,
    in_order: bool,
    weight: Tensor,
    is_transposed: bool,
    adapter: NSRUExpertLinear | None = None,
) -> Tensor:
    w_ENK = weight.mT if is_transposed else weight
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    x = x.to(compute_dtype(x) if autocast else weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if adapter is None:
            return _ExpertLinear.apply(x, routing, in_order, w_ENK, *[None] * 5)
        return _ExpertLinear.apply(
            x, routing, in_order, w_ENK, adapter.projected(x.dtype), adapter.lora_A,
            adapter.lora_B, adapter.basis, adapter,
        )  # fmt: skip


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Of transformers' experts, by its ``ExpertsInterface``: some of their linears are modules.

    Args:
        self: the module that holds the experts.
        hidden_states: [T, K].
        top_k_index, top_k_weights: [T, C], the experts of each token and their weights.

    Returns: [T, K] in the dtype of hidden_states.
    """
    routing = Routing(top_k_index, self.num_experts)

    def linear(name: str, x: Tensor, in_order: bool) -> Tensor:
        module = getattr(self, name)
        if isinstance(module, Tensor):
            module = ExpertLinear(self, name)
        y_SN = module(x, routing, in_order)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return y_SN if bias is None else y_SN + bias[routing.experts].to(y_SN.dtype)

    up_SN = linear("gate_up_proj" if self.has_gate else "up_proj", hidden_states, False)
    inner_SK = self._apply_gate(up_SN) if self.has_gate else self.act_fn(up_SN)
    y_SN = linear("down_proj", inner_SK, True)
    if getattr(self, "has_post_expert_norm", False):
        y_SN = self.post_expert_norm(y_SN)
    y_SN = y_SN * top_k_weights.reshape(-1, 1)[routing.order]
    return routing.sum_by_token(y_SN).to(hidden_states.dtype)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)


def is_experts(module: nn.Module) -> bool:
    """True for experts whose forward is one of transformers' ``ExpertsInterface``."""
    return (
        hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and hasattr(type(module).forward, "__wrapped__")
    )


def expert_linears(name: str, module: nn.Module) -> dict[str, ExpertLinear]:
    """Name → what an adapter can be put on, of this module; empty where it is no experts."""
    if not is_experts(module):
        return {}
    held = {end: module._parameters.get(end) for end in _LINEARS}
    return {
        f"{name}.{end}": ExpertLinear(module, end)
        for end, weight in held.items()
        if weight is not None and weight.dim() == 3
    }


def why_not_experts(linear: ExpertLinear) -> str | None:
    """The reason for which these experts cannot be adapted; None where they can."""
    experts, weight = linear.experts, linear.weight
    if not hasattr(experts, "has_gate"):
        return "its experts are those of a transformers before 5.3; update it"
    if type(weight) not in (nn.Parameter, FakeTensor) or weight.dtype not in _DTYPES:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        return f"its weights are a {kind}; only dense floats in one piece are supported"
    if nn.utils.parametrize.is_parametrized(experts):
        return "has a parametrization; remove it first"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over ranks; load the model without expert parallelism"
    if hasattr(experts, "_hf_hook"):
        return "accelerate moves its weights during forward; load the model without offloading"
    if "forward" in vars(experts):
        return "its forward has been replaced, so that an adapter would have no effect"
    return None


def _find_weights(experts, state_dict, prefix, *_) -> None:
    """Before experts with modules among their linears are loaded from what a base model has."""
    for name in _LINEARS:
        if name in experts._modules and prefix + name in state_dict:
            state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)


def choose_forward(experts: Any) -> None:
    """Let experts with modules among their linears run ``experts_forward``, others as before."""
    if any(name in experts._modules for name in _LINEARS):
        if not experts._load_state_dict_pre_hooks:
            experts.register_load_state_dict_pre_hook(_find_weights)
        if experts.config._experts_implementation != _IMPLEMENTATION:
            _register()
            experts._plain_config = experts.config
            experts.config = copy.copy(experts.config)  # the model's own is that of other layers
            experts.config._experts_implementation = {"": _IMPLEMENTATION}
    elif "_plain_config" in vars(experts):
        experts.config = vars(experts).pop("_plain_config")
    for name in _LINEARS:  # in their order again, also where one of them came back
        for own in (name, f"{name}_bias"):
            if own in experts._parameters:
                experts._parameters[own] = experts._parameters.pop(own)


@contextlib.contextmanager
def standing_in(linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it lasts, the ``ExpertLinear``s among these are modules that their model calls."""
    placed = {n: module for n, module in linears.items() if isinstance(module, ExpertLinear)}
    try:
        for name, module in placed.items():
            place(module.experts, name.rpartition(".")[2], module)
        yield
    finally:
        for name, module in placed.items():
            place(module.experts, name.rpartition(".")[2], module.weight)


def place(parent: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Make ``value`` the child or parameter ``name`` of ``parent``, in the place of another."""
    if name in parent._parameters and isinstance(value, nn.Module):
        delattr(parent, name)
    setattr(parent, name, value)
    if is_experts(parent):
        choose_forward(parent)
