"""Linears that compute x Wᵀ + b by a kernel of their own: quantised ones, Conv1D, subclasses."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nsru_kernels.dispatch.precision import full_float32
from nsru_kernels.nn.linear import NSRULinear, added, finite_weight
from nsru_kernels.nn.sharded import gathering
from nsru_kernels.nn.subspace import RetainSubspace

# Of random inputs: 8-bit activations are off by a hundredth, and in each token alike.
_AFFINE, _ALIKE = 0.05, 0.02
_ROWS = 1024  # of the identity that shows W
_tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # and found linear


class NSRUWrappedLinear(NSRULinear):
    """y = base_layer(x) + (alpha/rank) · dropout(x) Āᵀ Bᵀ, Ā = A (I - U Uᵀ), base_layer frozen.

    For whatever computes x Wᵀ + b: quantised linears of bitsandbytes, torchao, HQQ or GPTQ,
    transformers' ``Conv1D``, subclasses of ``nn.Linear``. Nothing of it is dequantised but by
    itself; ``weight`` and ``bias`` are what it computes with, read off its outputs.

    Args:
        base_layer: the layer; see ``why_not_linear`` for what can be one.
        rank: R ≥ 1.
        alpha: the update is scaled by alpha / rank.
        basis: U [K, Q] or a ``RetainSubspace``. None: plain LoRA.
        dropout: as for ``NSRULinear``.
        backend: likewise.

    Raises:
        ValueError: as for ``NSRULinear``.
        TypeError: likewise.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        *,
        alpha: float,
        basis: Tensor | RetainSubspace | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        k, n = linear_sizes(base_layer)
        super().__init__(
            k, n, rank, alpha=alpha, bias=False, dropout=dropout, device="meta", backend=backend
        )
        del self._parameters["weight"], self._parameters["bias"]
        self.base_layer = base_layer.requires_grad_(False)
        self._make_adapter(place_of(base_layer)[0])
        self._set_basis(basis)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [N, K], as base_layer computes with it."""
        return affine_map(self.base_layer)[0]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return getattr(self.base_layer, "bias", None)

    @property
    def dtype(self) -> torch.dtype:
        return place_of(self.base_layer)[1]

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] of x [..., K], in the dtype of base_layer's output."""
        y = self.base_layer(input)
        if not self.enabled:
            return y
        # base_layer has its own W and b; nobody asks for them here.
        operands = (y, None, self.lora_A, self.lora_B, self.scaling)
        return self.group.compute((self,), (operands,), input, y)[0]

    def merge(self) -> None:
        """Refused: what is quantised cannot be added to and put back."""
        raise ValueError(
            f"NSRUWrappedLinear: {type(self.base_layer).__name__} cannot be merged into for a "
            "time; merge_adapters(model) does it for good."
        )

    @torch.no_grad()
    @gathering
    def check_mergeable(self) -> None:
        """Raise ValueError where a merged model, once saved, would be read back as another one."""
        layer = self.base_layer
        if is_own_kind(layer) and _own_weight(layer, affine_map(layer)[0]) is None:
            raise ValueError(
                f"{type(layer).__name__} computes with something else than its weight, so that a "
                "saved model would not be read back as it was merged. Serve base and adapter "
                "(save_lora_adapter), or train with this layer in exclude."
            )

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype) -> nn.Module:
        """base_layer where its own weight can take the update, else a plain layer in dtype."""
        w_NK, bias_N = affine_map(self.base_layer, dtype)
        merged = added(self.delta_weight(), w_NK)
        own_NK = _own_weight(self.base_layer, w_NK)
        if own_NK is not None:
            own_NK.copy_(finite_weight(merged.to(own_NK.dtype)))
            return self.base_layer
        return _linear_like(self.base_layer, finite_weight(merged.to(dtype)), bias_N, dtype)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a layer that says so itself, or of a ``Conv1D``; (0, 0) of others."""
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        k, n = module.weight.shape if module.weight.dim() == 2 else (0, 0)
        return k, n
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else (0, 0)  # type: ignore


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for an ``nn.Linear`` of an ordinary weight, which ``NSRULinear`` computes itself."""
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, FakeTensor)


def is_own_kind(module: nn.Module) -> bool:
    """True for a dense linear of a class that came with its model, which reads its weight back.

    Not for what only quantises: transformers takes that out of a model that is merged.
    """
    kind, weight = type(module), getattr(module, "weight", None)
    if kind is nn.Linear or kind.__name__ == "Conv1D":
        return False
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return False
    return weight.element_size() > 1 and not kind.__module__.startswith("transformers.integrations")


def _own_weight(module: nn.Module, w_NK: Tensor) -> Tensor | None:
    """The layer's own weight as [N, K] where that is W; None where it computes with another."""
    own = getattr(module, "weight", None)
    if type(own) is nn.Parameter and own.is_floating_point():
        for view_NK in (own.data, own.data.T):
            if view_NK.shape == w_NK.shape and torch.equal(view_NK, w_NK.to(own.dtype)):
                return view_NK
    return None


def why_not_linear(module: nn.Module) -> str | None:
    """The reason for which an adapter cannot stand beside this layer; None where it can.

    It is tried: tokens have to come out as those of x Wᵀ + b would, in company and alone, time and
    again, and gradients to go back. Its buffers and torch's random state are then as before.
    """
    if module in _tried:
        return None
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if type(module) is nn.Linear and type(weight) is not nn.Parameter:
        kind += f" of {type(weight).__name__}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight instead of calling it"
    device, _ = place_of(module)
    if device.type == "meta":
        return f"{kind} is on no device yet, so that it cannot be tried; load its weights first"
    training, buffers = module.training, [(own, own.clone()) for own in module.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            reason = _found_wrong(module, kind) or _wrong_in_training(module, kind)
    except Exception as error:  # of any library
        reason = f"{kind} cannot compute here ({str(error).partition(chr(10))[0]:.100})"
    finally:
        module.train(training)
        for own, before in buffers:
            own.copy_(before)
    if reason is None:
        _tried.add(module)
    return reason


def _tokens(module: nn.Module) -> Tensor:
    """x [2, 6, K]; the first six are x, z, 0, x + z, -x and 3 x."""
    k, _ = linear_sizes(module)
    generator = torch.Generator().manual_seed(0)
    tokens_BTK = torch.randn(2, 6, k, generator=generator, dtype=torch.float32, device="cpu")
    x_K, z_K = tokens_BTK[0, :2]
    tokens_BTK[0, 2:] = torch.stack([torch.zeros_like(x_K), x_K + z_K, -x_K, 3 * x_K])
    return tokens_BTK.to(*place_of(module))


def _found_wrong(module: nn.Module, kind: str) -> str | None:
    """Reasons against a layer, by a trial in eval mode."""
    (k, n), weight = linear_sizes(module), getattr(module, "weight", None)
    tokens_BTK = _tokens(module).requires_grad_()
    module.eval()
    with torch.enable_grad():
        y_BTN = module(tokens_BTK)
        if not isinstance(y_BTN, Tensor) or y_BTN.shape != (2, 6, n):
            return f"{kind} gives no output [..., N={n}] of x [..., K={k}]"
        back = y_BTN.requires_grad and torch.autograd.grad(
            y_BTN.sum(), tokens_BTK, allow_unused=True
        )
    if not back or back[0] is None:
        packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
        remedy = " once a forward in eval mode has packed it; load the model again" * packed
        return f"gradients do not pass through {kind}{remedy}"
    with torch.no_grad():
        alone_2N = torch.cat([module(tokens_BTK[0, :1]), module(tokens_BTK[1, 5:])])
    x, z, zero, both, minus, triple = y_BTN[0].detach().double()
    beside_2N = torch.stack([x, y_BTN[1, 5].detach().double()])
    scale = (y_BTN.detach() - zero).abs().max()
    # Neither its own size nor the other tokens, nor an earlier call, may change what one gives.
    relations = (x + z - both - zero, x + minus - 2 * zero, triple + 2 * zero - 3 * x)
    off = torch.stack(relations).abs().max()
    if not (off <= _AFFINE * scale and (alone_2N - beside_2N).abs().max() <= _ALIKE * scale):
        return f"{kind} does not compute x Wᵀ + b"
    return None


@torch.no_grad()
def _wrong_in_training(module: nn.Module, kind: str) -> str | None:
    """Reasons against a layer, by two calls in training mode; none where it only infers."""
    with contextlib.suppress(Exception):
        module.train()
        tokens_BTK = _tokens(module)
        first_BTN = module(tokens_BTK)
        off = (module(tokens_BTK) - first_BTN).abs().max()
        if not off <= _ALIKE * (first_BTN - first_BTN[0, 2]).abs().max():
            return f"{kind} gives other outputs at each call in training mode"
    return None


def keep_unpacked(model: nn.Module) -> None:
    """Let 4-bit layers of bitsandbytes stay as they were loaded, on a CPU.

    Where it finds avx512_bf16, a forward in eval mode packs them for good: no gradient passes then,
    though nothing says so, and the scales lose bits.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def affine_map(module: nn.Module, model_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(W [N, K], b [N]) of a layer that computes x Wᵀ + b, read off its outputs, in its dtype."""
    with full_float32(place_of(module)[0]):  # or W would be rounded
        return _read_off(module, model_dtype)


def _read_off(module: nn.Module, model_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    k, _ = linear_sizes(module)
    device, dtype = place_of(module, model_dtype)
    bias_N = module(torch.zeros(1, k, device=device, dtype=dtype))[0]
    own: Any = getattr(module, "bias", None)
    kept = own.detach().clone() if isinstance(own, Tensor) else None
    try:
        if kept is not None:
            own.data.zero_()  # W + b would round W
        rest_N = bias_N if kept is None else torch.zeros_like(bias_N)
        rows = []
        for start in range(0, k, _ROWS):
            ones = torch.arange(start, min(start + _ROWS, k), device=device)
            rows.append(module(F.one_hot(ones, k).to(dtype)) - rest_N)
    finally:
        if kept is not None:
            own.data.copy_(kept)
    return torch.cat(rows).T, bias_N


def dense_linear(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain layer in ``dtype`` of what a layer that computes x Wᵀ + b computes; frozen."""
    return _linear_like(module, *affine_map(module, dtype), dtype)


@torch.no_grad()
def _linear_like(module: nn.Module, w_NK: Tensor, bias_N: Tensor, dtype: torch.dtype) -> nn.Module:
    (n, k), has_bias = w_NK.shape, getattr(module, "bias", None) is not None or bias_N.any()
    # transformers put quantised linears in the place of GPT-2's Conv1D, too.
    source: Any = getattr(module, "source_cls", type(module))
    linear: Any
    if source.__name__ == "Conv1D":
        linear = source(n, k).to(w_NK.device, dtype)
        linear.weight.copy_(w_NK.t())
    else:
        linear = nn.Linear(k, n, bias=bool(has_bias), device=w_NK.device, dtype=dtype)
        linear.weight.copy_(w_NK)
    if has_bias:
        linear.bias.copy_(bias_N)
    return linear.requires_grad_(False).train(module.training)


def place_of(
    module: nn.Module, model_dtype: torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device of a layer, and the dtype that it computes in.

    That is what it says itself, else its model's, whose activations it is given; else that of its
    scales, which GPTQ keeps in float16 everywhere; float32 where nothing says.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    own = (
        getattr(module, "compute_dtype", None),
        getattr(getattr(module, "weight", None), "dtype", None),
    )
    dtypes = (*own, model_dtype, *[tensor.dtype for tensor in tensors])
    floating = (d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point)
    return device, next(floating, torch.float32)
