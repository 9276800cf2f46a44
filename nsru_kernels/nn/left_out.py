"""Why a layer is left out of a swap, and what else of a model no adapter reaches."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nsru_kernels.nn.experts import ExpertLinear, is_experts, why_not_experts
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.sharded import is_shard
from nsru_kernels.nn.wrapped import is_plain, linear_sizes, why_not_linear

# Where PEFT refuses out_proj: on a GPU training reads its weight, here a forward calls it.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
# Targets that PEFT takes for those of fused experts, also where a dense layer has the name, by the
# kind of checkpoint that holds the experts apart.
_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_ROUTER = re.compile(r"(Router|Gating|Gate)$")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def entries(parameter: Tensor) -> int:
    """Of the weight that it stands for: bitsandbytes keeps two of 4 bits in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def looks_linear(module: nn.Module) -> bool:
    """True for what computes like ``nn.Linear`` by itself, whatever holds its weight."""
    return isinstance(module, nn.Linear) or (
        linear_sizes(module)[0] > 0
        and not isinstance(module, NSRULinear)
        and not any(True for child in module.children() for _ in child.parameters())
    )


def cannot_swap(module: nn.Module) -> str | None:
    """The reason against swapping a layer that looks linear; None where it can be."""
    if isinstance(module, ExpertLinear):
        return why_not_experts(module)
    if nn.utils.parametrize.is_parametrized(module):
        return "has a parametrization; remove it first"
    weight: Any = getattr(module, "weight", None)
    if is_shard(weight):
        return (
            "its weight is a DTensor: estimate and swap before fully_shard; of a tensor-parallel "
            "model, load it without tp_plan"
        )
    if torch.nn.parameter.is_lazy(weight):
        return "its weight has no size yet; run the model once"
    if is_plain(module) and (weight.layout is not torch.strided or not weight.is_floating_point()):
        return (
            f"its weight is of {weight.layout} and {weight.dtype}; only dense floats are supported"
        )
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weights during forward; load the model without offloading"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks, which a swap would drop; remove them first"
    if "forward" in vars(module):
        return "its forward has been replaced, which a swap would drop"
    return None if is_plain(module) else why_not_linear(module)


def text_part(model: nn.Module) -> set[nn.Module] | None:
    """The modules of a vision-language model that read and write text; None of other models."""
    config, get_decoder = getattr(model, "config", None), getattr(model, "get_decoder", None)
    if getattr(config, "text_config", None) is None or not callable(get_decoder):
        return None
    return set(get_decoder().modules())


def routes(model: nn.Module, name: str) -> bool:
    """True for a linear that chooses the experts of a token, by what families call that.

    A gate or router is one only beside experts, or by the name of router in a model of experts.
    """
    *above, own = name.split(".")
    holders = [model.get_submodule(".".join(above[:i])) for i in range(len(above) + 1)]
    by_name = any("router" in part for part in (*above, own))
    by_class = any(_ROUTER.search(type(holder).__name__) for holder in holders)
    if not (by_name or by_class or own == "gate"):
        return False
    if by_name and any("experts" in setting for setting in _settings(model)):
        return True
    near: list[tuple[str, nn.Module | None]] = [("", holder) for holder in holders[-3:]]
    near += [child for holder in holders[-3:] for child in holder._modules.items()]
    return any("expert" in child or "Expert" in type(module).__name__ for child, module in near)


def _settings(model: nn.Module) -> dict[str, Any]:
    return getattr(getattr(model, "config", None), "__dict__", {})


def held_by_hand(model: nn.Module) -> dict[int, str]:
    """Identity of a module → where another one holds it besides as a child, such as in a list.

    There a swap would leave it, or its forward.
    """
    held: dict[int, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for owner in _modules_in(value, seen):
                if owner is not module:
                    held[id(owner)] = f"{name}.{attribute}".lstrip(".")
    return held


def _modules_in(value: Any, seen: set[int], depth: int = 6) -> Iterator[nn.Module]:
    """Modules that a value leads to: by containers, objects, partials, closures, bound methods."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and id(value) not in seen and not isinstance(value, (type, ModuleType, Tensor)):
        seen.add(id(value))
        if isinstance(value, FunctionType):  # its globals lead anywhere
            parts = [value.__closure__, value.__defaults__, value.__kwdefaults__]
        else:
            parts = gc.get_referents(value)
        for part in parts:
            yield from _modules_in(part, seen, depth - 1)


def shared_memory(model: nn.Module) -> set[int]:
    """Identities of the parameters whose memory holds another one or a buffer too.

    By addresses, since two Parameters can stand for one weight, and one storage hold many weights.
    """
    spans = []
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            space, start, size = "identities", id(tensor), 1
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
            if plain and not tensor.is_meta and tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                space, start = str(tensor.device), tensor.data_ptr()
                size = (last + 1) * tensor.element_size()
            spans.append((space, start, start + size, id(tensor)))
    shared: set[int] = set()
    before = ("", 0, 0, 0)  # of those that begin earlier, the one that ends last
    for span in sorted(spans):
        if span[0] == before[0] and span[1] < before[2]:
            shared |= {span[3], before[3]}
        before = max(before, span, key=lambda s: (s[0], s[2]))
    return shared


def refused_by_peft(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reasons for which PEFT would not load adapters of some layers, by their names."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return {}
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

        fused = _EXPERTS.get(_MODEL_TO_CONVERSION_PATTERN.get(kind), ())
    except ImportError:  # older, with experts that are linear layers
        fused = ()
    reasons: dict[str, str] = {}
    for name, module in linears.items():
        end = name.rpartition(".")[2]
        if kind in _MAMBA and end == "out_proj":
            reasons[name] = (
                "fused kernels of Mamba read its weight, and PEFT refuses an adapter there"
            )
        elif end in fused and not isinstance(module, ExpertLinear):
            reasons[name] = (
                "PEFT takes its name for that of fused experts, and would not load it here"
            )
    rest = [n for n, m in linears.items() if n not in reasons and not isinstance(m, ExpertLinear)]
    renamed = "PEFT looks for its adapter under another name, and would not load it here"
    return reasons | dict.fromkeys(_renamed_by_peft(model, rest), renamed)


def _renamed_by_peft(model: nn.Module, names: Collection[str]) -> set[str]:
    """Those of ``names`` whose adapters PEFT looks for under others, and so would not load."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind is None or get_checkpoint_conversion_mapping(kind) is None:
            return set()
        from peft import LoraConfig
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # versions that rename nothing
        return set()
    keys = {f"base_model.model.{name}.lora_{ab}.weight": name for name in names for ab in "AB"}
    tensors = {key: torch.zeros(1, 1) for key in keys}
    kept = conversion.convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return {name for key, name in keys.items() if key not in kept}


def matrices_left(model: nn.Module, known: Collection[str]) -> dict[str, str]:
    """Name → what is left out, for the modules that hold matrices and are no linear layers.

    Such as all experts of a layer. Their share of the parameters says how much of the knowledge no
    adapter reaches; below a hundredth nothing is said of those that are no experts.

    Args:
        known: names of parameters of experts of which something else is said.
    """
    total, text = sum(map(entries, model.parameters())), text_part(model)
    sizes: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" or "experts" in type(module).__name__.lower():
            kind, least = ("interface" if is_experts(module) else "experts"), 3
        elif _holds_bare_matrices(module) and (text is None or module in text):
            kind, least = "matrices", 2
        else:
            continue
        size = sum(
            entries(p)
            for own, p in module._parameters.items()
            if p is not None and p.dim() >= least and f"{name}.{own}" not in known
        )
        if size:
            sizes[name] = kind, size
    shares: dict[str, float] = dict.fromkeys(("interface", "experts", "matrices"), 0.0)
    for kind, size in sizes.values():
        shares[kind] += size / max(1, total)
    only = "only linear layers and experts of transformers' ExpertsInterface are supported"
    reasons = {
        "interface": ("fused experts", "add 'experts' to the targets to adapt them"),
        "experts": ("fused experts", only),
        "matrices": ("matrices that are no linear layers", "no adapter reaches them"),
    }
    return {
        name: f"{reasons[kind][0]}, {shares[kind]:.0%} of all parameters; {reasons[kind][1]}"
        for name, (kind, _) in sizes.items()
        if kind != "matrices" or shares[kind] >= 0.01
    }


def _holds_bare_matrices(module: nn.Module) -> bool:
    """True where its own parameters could be matrices of a model's: it is no layer of torch.nn."""
    layers = ("torch.nn.modules.", "nsru_kernels.")
    kinds = [kind.__module__ for kind in type(module).__mro__ if kind is not nn.Module]
    return not any(kind.startswith(layers) for kind in kinds) and not looks_linear(module)
