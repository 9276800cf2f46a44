"""The null space inside LoRA layers that PEFT made: A is projected wherever PEFT reads it.

A itself is kept in the null space, so that PEFT merges, saves, copies and shards what it always
does. That trains as `NSRULinear` does: the gradient is projected, so what an optimizer such as
AdamW adds is the same, and what it adds outside of the null space is taken off after its step.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.hf.peft_format import PLAIN_STARTS
from nsru_kernels.nn.names import plain_name, unwrap
from nsru_kernels.nn.projections import projection_key, steps
from nsru_kernels.nn.sharded import comes_and_goes
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.nn.swap import holder_of, names_in
from nsru_kernels.ops.project import check_projection, project_adapter, project_adapters

# Their A is no matrix that every x of one linear layer is multiplied by.
_OTHER_LAYERS = ("LoraParallelLinear", "MultiheadAttention", "ParamWrapper")


class Constraint:
    """The changes of `constrain_peft` to a model; a context manager that undoes them.

    Attributes:
        retain_ranks: module name → Q of its basis.
    """

    def __init__(self, model: nn.Module, modules: list[NullSpaceA], ranks: dict[str, int]) -> None:
        self.retain_ranks = ranks
        self._modules = [weakref.ref(module) for module in modules]
        hooks = [
            register_optimizer_step_pre_hook(functools.partial(_before_step, weakref.ref(model))),
            register_optimizer_step_post_hook(_after_step),
        ]
        self._hooks = [weakref.finalize(model, hook.remove) for hook in hooks]

    def project(self) -> None:
        """Project every A again, as is needed after an edit through ``.data`` by hand."""
        _project(self._alive())

    def remove(self) -> None:
        """Leave the layers to PEFT alone. A stays projected: outputs do not change. Idempotent."""
        for module in self._alive():
            module.current()
            module.release()
        for hook in self._hooks:
            hook()
        self._modules = []

    def _alive(self) -> list[NullSpaceA]:
        return [module for ref in self._modules if (module := ref()) is not None]

    def __enter__(self) -> Constraint:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


class NullSpace:
    """Where an A belongs, and what it was when it was last put there. No module: PEFT saves those.

    Optimizer steps are counted while there is one.
    """

    def __init__(self, subspace: RetainSubspace, backend: str) -> None:
        self.subspace, self.backend = subspace, backend
        self.known: tuple | None = None
        steps.watch(self)

    def __reduce__(self):
        return NullSpace, (self.subspace, self.backend)  # a copy's A has no hook yet


class NullSpaceA(nn.Linear):
    """``lora_A`` of a constrained adapter, which PEFT made as an ``nn.Linear``."""

    def confine(self, null_space: NullSpace) -> None:
        """Make A, from now on, one of this null space."""
        self.null_space = null_space
        _constrained[self] = None

    def release(self) -> None:
        """Become the ``nn.Linear`` again that this was made of."""
        if (hook := _gradient_hooks.pop(self.stored, None)) is not None:
            hook.remove()
        del _constrained[self], self.null_space
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def stored(self) -> nn.Parameter:
        """A as it is."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def key(self) -> tuple:
        """A key that changes when A does, as far as PyTorch counts it."""
        return projection_key(self.stored.dtype, (self.stored,), self.null_space.subspace.basis)

    def current(self) -> Tensor:
        """A itself, projected; with it every other one that changed."""
        if comes_and_goes(self.stored):
            raise RuntimeError(
                "constrain_peft: DeepSpeed ZeRO-3 would save A as its optimizer left it, outside "
                "of the null space. Use ZeRO-1 or ZeRO-2, or FSDP2 (fully_shard); or swap_linears "
                "in a loop of your own, where save_lora_adapter projects what it saves."
            )
        if self.null_space.known != self.key():
            _project(m for m in list(_constrained) if m.null_space.known != m.key())
        return self.stored

    @property
    def weight(self) -> Tensor:
        """A [R, K] in the null space."""
        if torch.compiler.is_compiling():  # a graph has to project by itself
            basis, backend = self.null_space.subspace.basis, self.null_space.backend
            return project_adapter(self.stored, basis, backend=backend)
        return self.current()

    @weight.setter
    def weight(self, value: Tensor) -> None:  # PyTorch sets parameters in another way
        raise RuntimeError(
            "constrain_peft: something would put a plain tensor in the place of lora_A, as "
            "FullyShardedDataParallel and DataParallel do. Use fully_shard or "
            "DistributedDataParallel."
        )

    def _apply(self, fn, recurse=True):
        # Two casts can bring an address back, and neither is counted as an edit.
        self.null_space.known = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.current()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __setstate__(self, state):
        super().__setstate__(state)
        _constrained[self] = None


_constrained: weakref.WeakKeyDictionary[NullSpaceA, None] = weakref.WeakKeyDictionary()
_gradient_hooks = WeakTensorKeyDictionary()  # A → the hook that projects its gradient


def constrain_peft(
    model: nn.Module,
    subspaces: Mapping[str, Any],
    *,
    adapters: str | Sequence[str] | None = None,
    backend: str = "auto",
) -> Constraint:
    """Confine the LoRA adapters of a PEFT model to the null space of its retain subspaces.

    For any script of PEFT, transformers or TRL: ``lora_A`` holds Ā = A (I - U Uᵀ) from now on, once
    per change of A, and its gradient is projected. What PEFT merges, saves or copies is then plain
    LoRA without leakage. An adapter that has been trained before loses what it did outside of the
    null space. As long as it lasts, an optimizer that would train anything else of the model is
    refused. Optimizers that measure A itself (LAMB, Adafactor) measure Ā.

    Args:
        model: a ``PeftModel``, or a model that PEFT put LoRA layers into; changed in place.
        subspaces: from ``estimate_retain_subspaces`` on the model before PEFT: name of a linear
            layer in the model without PEFT → ``RetainSubspace`` (or a basis tensor [K, Q]), one for
            every LoRA layer.
        adapters: names of adapters. None: the active ones.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Returns:
        the constraint: ``remove()``, or the end of a with block, undoes it.

    Raises:
        ValueError: there is no such adapter, a subspace is missing, of another size or from another
            model; a layer is merged, sharded, constrained already or no plain LoRA on a linear
            layer (DoRA, QALoRA, PiSSA, target_parameters, ...); or something else of the model is
            trained too (modules_to_save, biases). The model is then as it was.
        TypeError: ``subspaces`` is no mapping, or an entry has no basis tensor.
        BackendUnavailable: a backend named explicitly cannot run here.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> u = torch.linalg.qr(torch.randn(8, 2)).Q
        >>> with constrain_peft(model, {"0": u}):
        ...     a = model.base_model.model[0].lora_A["default"].weight
        >>> bool((a @ u).norm() < 1e-6)
        True
    """
    requested_backend(backend)
    if not isinstance(subspaces, Mapping):
        raise TypeError(
            "constrain_peft: subspaces must map names of modules to their subspaces, got "
            f"{type(subspaces).__name__}; estimate_retain_subspaces returns such a dict."
        )
    model = unwrap(model)
    inside = getattr(model, "get_base_model", None)
    base = inside() if callable(inside) else model
    chosen = _choose(base, adapters)
    configs = getattr(model, "peft_config", {})
    for name, adapter, layer in chosen:
        if reason := _cannot_constrain(layer, adapter, configs.get(adapter)):
            raise ValueError(f"constrain_peft: {name}: adapter {adapter!r} {reason}")
    if missing := [name for name, _, _ in chosen if name not in subspaces]:
        raise ValueError(
            f"constrain_peft: subspaces has no entry for {len(missing)} of {len(chosen)} LoRA "
            f"layers, the first {missing[0]!r}. Estimate them on the model before PEFT wraps it, "
            "with the same targets."
        )
    linears = [layer.lora_A[adapter] for _, adapter, layer in chosen]
    others = [layer.lora_B[adapter] for _, adapter, layer in chosen]
    confined = {id(module.weight) for module in linears + others} | _confined(base)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and id(parameter) not in confined:
            raise ValueError(
                f"constrain_peft: {name} is trained too, outside of the null space; freeze it "
                "(requires_grad_(False)), or leave it out of the LoraConfig (modules_to_save, bias)"
                ", or name its adapter in adapters."
            )
    if hasattr(subspaces, "check_model"):
        subspaces.check_model(base)
    holders: dict = {}
    spaces = []
    for (name, _, _), linear in zip(chosen, linears, strict=True):
        try:
            subspace = holder_of(subspaces[name], linear, holders)
            check_projection("basis", linear.weight.detach(), subspace.basis)
        except (TypeError, ValueError) as error:
            raise type(error)(f"constrain_peft: {name}: {error}") from error
        spaces.append(NullSpace(subspace, backend))
    for linear, space in zip(linears, spaces, strict=True):
        linear.__class__ = NullSpaceA
        linear.confine(space)
    try:
        _project(linears)
    except Exception:
        for linear in linears:
            linear.release()
        raise
    names = [name for name, _, _ in chosen]
    ranks = {n: space.subspace.rank for n, space in zip(names, spaces, strict=True)}
    return Constraint(base, linears, ranks)


def _choose(base: nn.Module, adapters: str | Sequence[str] | None) -> list[tuple[str, str, Any]]:
    """Name of a layer in the plain model, name of an adapter, the layer: what is to be confined."""
    from peft.tuners.lora import LoraLayer

    layers = {plain_name(n): m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise ValueError(
            "constrain_peft: model has no LoRA layer of PEFT; make them with get_peft_model, or "
            "use swap_linears on a plain model."
        )
    known = {
        name: [*layer.lora_A.keys(), *layer.lora_embedding_A.keys()]
        for name, layer in layers.items()
    }
    asked = None if adapters is None else names_in("constrain_peft: adapters", adapters)
    chosen = [
        (name, adapter, layer)
        for name, layer in layers.items()
        for adapter in known[name]
        if adapter in (layer.active_adapters if asked is None else asked)
    ]
    everywhere = sorted({adapter for names in known.values() for adapter in names})
    if unknown := sorted(set(asked or ()) - {*everywhere}):
        raise ValueError(
            f"constrain_peft: adapters has {unknown[0]!r}; the model's adapters are {everywhere}."
        )
    if not chosen:
        raise ValueError(
            f"constrain_peft: no adapter of {everywhere} is active; name those meant in adapters."
        )
    return chosen


def _cannot_constrain(layer: Any, adapter: str, config: Any) -> str | None:
    kind, start = type(layer).__name__, getattr(config, "init_lora_weights", True)
    module = dict(layer.lora_A).get(adapter)
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        return f"is a {variant}, which is more than x Aᵀ Bᵀ; use plain LoRA."
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        return (
            f"began with init_lora_weights={start!r}, which moves part of W into A and B, where a "
            "projection would lose it; use True."
        )
    if isinstance(module, NullSpaceA):
        return "is constrained already; call remove() of its constraint first."
    if kind in _OTHER_LAYERS or type(module) is not nn.Linear:
        return f"is in a {kind} layer; only LoRA on a linear layer can be constrained."
    if adapter in layer.merged_adapters:
        return "is merged; call unmerge_adapter() first."
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.shape != (layer.r[adapter], layer.in_features):
        return "is sharded; call constrain_peft before the model is."
    return None


def _confined(base: nn.Module) -> set[int]:
    """Identities of the parameters of all adapters that are constrained."""
    found = set()
    for layer in base.modules():
        sides = layer._modules.get("lora_A"), layer._modules.get("lora_B")
        if isinstance(sides[0], nn.ModuleDict) and isinstance(sides[1], nn.ModuleDict):
            for adapter, module in sides[0].items():
                if isinstance(module, NullSpaceA):
                    found |= {id(module.stored), id(sides[1][adapter].weight)}
    return found


def _project(modules: Iterable[NullSpaceA]) -> None:
    """Put A of these into their null space, in one launch for each device."""
    launches: dict[tuple, list[tuple[NullSpaceA, Tensor]]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            subspace, backend = module.null_space.subspace, module.null_space.backend
            parameter = module.stored
            if parameter.requires_grad and parameter not in _gradient_hooks:
                project = functools.partial(_project_gradient, subspace, backend)
                _gradient_hooks[parameter] = parameter.register_hook(project)
            # FSDP shards rows of A, and each is projected by itself. Through .data, for this is no
            # edit: graphs that saved A stay as good as they were.
            a_RK = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data
            if a_RK.numel() and not a_RK.is_meta:
                launches.setdefault((a_RK.device, backend), []).append((module, a_RK))
        for (device, backend), parts in launches.items():
            bases = [_basis_on(device, module.null_space.subspace) for module, _ in parts]
            projected = project_adapters([a_RK for _, a_RK in parts], bases, backend=backend)
            for (module, a_RK), new in zip(parts, projected, strict=True):
                a_RK.copy_(new)
                module.null_space.known = module.key()


def _project_gradient(subspace: RetainSubspace, backend: str, grad: Tensor) -> Tensor:
    return project_adapter(grad, _basis_on(grad.device, subspace), backend=backend)


def _basis_on(device: torch.device, subspace: RetainSubspace) -> Tensor:
    """U, which follows its adapter."""
    return (subspace if subspace.basis.device == device else subspace.to(device)).basis


def _before_step(model: weakref.ref[nn.Module], optimizer: torch.optim.Optimizer, *_) -> None:
    base = model()
    confined = set() if base is None else _confined(base)
    held = {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    others = held - confined
    # Merged and unloaded it is a plain model; with other adapters it is not.
    if base is None or not others or not (confined or any(map(_is_lora, base.modules()))):
        return
    for name, parameter in base.named_parameters():
        if id(parameter) in others:
            raise RuntimeError(
                f"constrain_peft: {name} would be trained outside of the null space: its adapter "
                "was added, or it was unfrozen, after constrain_peft. Freeze it, or call "
                "constrain_peft(..., adapters=NAME) for the adapter."
            )


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _after_step(optimizer: torch.optim.Optimizer, *_) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _project(m for m in list(_constrained) if id(m.stored) in held)
