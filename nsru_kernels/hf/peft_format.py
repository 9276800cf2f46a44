"""(Ā, B) as a plain LoRA adapter in PEFT's directory format, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nsru_kernels.files import atomic_write_all, check_fields, read_json, read_tensors
from nsru_kernels.nn.experts import ExpertLinear, NSRUExpertLinear, expert_linears
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.names import plain_name, unwrap
from nsru_kernels.nn.sharded import (
    gathered,
    is_shard,
    on_first_rank,
    refuse_parts,
    reshard,
    shards_like,
)
from nsru_kernels.nn.swap import SwapReport, by_pattern, swap_linears
from nsru_kernels.nn.wrapped import is_plain, linear_sizes

Value = TypeVar("Value", int, float)
Factors = tuple[Tensor, Tensor]  # A [R, K] and B [N, R] of one adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SIDECAR = "nsru.json"
_BASE = ".base_layer.weight"
_PREFIX = "base_model.model."
_FIELDS = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "use_rslora": bool,
    "bias": str,
}
_DEFAULTS: dict[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "bias": "none",
}
# By which PEFT finds modules.
_RULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# With these the folder's A and B are not all there is to it.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# PEFT starts from other base weights with any other name.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_TRANSLATED = (
    "Names of an older transformers or PEFT are read by PeftModel.from_pretrained, whose "
    "save_pretrained writes those of today."
)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_lora_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write the adapters as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    The projection is projected in, so PEFT, vLLM and ``merge_and_unload`` take the folder as it is.
    ``nsru.json`` beside them says how much of each adapter leaks into its retain subspace. An
    adapter that was there before stays whole when writing fails. Of a model that ``fully_shard``
    has sharded every rank makes the call: modules are gathered one by one, and one rank writes.

    Args:
        model: has ``NSRULinear`` modules, none merged. Names are those of the plain model, also
            where it or its layers are wrapped by ``torch.compile`` and the like.
        path: folder, made if need be.
        metadata: more entries for ``nsru.json``, beside the fingerprint of the frozen weights by
            which ``load_lora_adapter`` refuses another base.

    Returns:
        the folder.

    Raises:
        ValueError: no ``NSRULinear``, one is merged or sharded by FSDP1 or ZeRO-3, or one holds NaN
            or infinite values.
        RuntimeError: another rank of a sharded model could not write.
        TypeError: metadata cannot be written as JSON.
        OSError: the disk is full or the folder cannot be written; files there before are unharmed.
    """
    from safetensors.torch import save

    model = unwrap(model)
    modules = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, NSRULinear)}
    if not modules:
        raise ValueError("save_lora_adapter: model has no NSRULinear; nothing to save.")
    if "" in modules:
        raise ValueError("save_lora_adapter: model is an NSRULinear itself; save one that has it.")
    if merged := [name for name, module in modules.items() if module.merged]:
        raise ValueError(f"save_lora_adapter: {merged[0]} is merged; call unmerge() first.")
    for name, module in modules.items():
        refuse_parts(name, module)
        if module.lora_B.shape[1] != len(module.lora_A):
            raise ValueError(
                f"save_lora_adapter: {name} is no plain LoRA: lora_B has {module.lora_B.shape[1]} "
                f"columns and lora_A {len(module.lora_A)} rows. Save it by what put it there."
            )
    adapters = {id(p) for m in modules.values() for p in (m.lora_A, m.lora_B)}
    beside = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    if beside:
        warnings.warn(
            f"save_lora_adapter: {len(beside)} parameters beside the adapters can be trained, such "
            f"as {beside[0]}. What they learn is not in the null space, and not saved here.",
            stacklevel=2,
        )
    alpha, folder = _one_alpha(modules), Path(path)
    kept = {**dict(zip(modules, modules, strict=True)), **_names_in_peft(_of_experts(modules))}
    tensors: dict[str, Tensor] = {}
    leakage: dict[str, float] = {}
    with on_first_rank(model) as first:
        for name, module in modules.items():
            with gathered(module):
                if first:
                    if module.basis is not None:
                        leakage[name] = module.leakage()
                    tensors |= _tensors(kept[name], module, alpha)
        if first:
            _check_finite(tensors)
            _warn_of_zeros({n: tensors[f"{_PREFIX}{kept[n]}.lora_B.weight"] for n in modules})
            alphas = {name: module.alpha for name, module in modules.items()}
            more = dict(metadata or {})
            if not beside and "fingerprint" not in more:
                more |= _base_fingerprint(model)
            sidecar = {"schema": 1, "leakage": leakage, "alphas": alphas, **more}
            atomic_write_all(
                {
                    folder / WEIGHTS: save(tensors, metadata={"format": "pt"}),
                    folder / SIDECAR: json.dumps(sidecar, indent=2) + "\n",
                    folder / CONFIG: json.dumps(_config(model, modules, alpha), indent=2) + "\n",
                }
            )
    return folder


def _base_fingerprint(model: nn.Module) -> dict[str, str]:
    from nsru_kernels.subspaces.collection import fingerprint_weights

    return {"fingerprint": fingerprint_weights(model)} if _are_whole(model) else {}


def _are_whole(model: nn.Module) -> bool:
    """True where all weights are here: none is sharded or on no device."""
    return not any(is_shard(weight) or weight.is_meta for weight in model.parameters())


def _tensors(name: str, module: NSRULinear, alpha: float) -> dict[str, Tensor]:
    """Ā and B of a module on the CPU, by their names in the file, B for ``lora_alpha`` alpha."""
    a_RK = module.projected_adapter()
    b_NR = module.lora_B.detach().to(a_RK.dtype) * (module.alpha / alpha)
    return {
        f"{_PREFIX}{name}.lora_{side}.weight": tensor.cpu().contiguous().resolve_neg()
        for side, tensor in (("A", a_RK), ("B", b_NR))
    }


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"save_lora_adapter: {key} holds NaN or infinite values: training diverged. "
                "Nothing was written."
            )


def _warn_of_zeros(found: Mapping[str, Tensor]) -> None:
    """Of B that are 0 beside others that are not."""
    zeros = [name for name, b_NR in found.items() if not b_NR.any()]
    if 0 < len(zeros) < len(found):
        warnings.warn(
            f"save_lora_adapter: {len(zeros)} of {len(found)} adapters are zero, such as that of "
            f"{zeros[0]}: no gradient reached them. No token did, nothing is left open there, or "
            "the model does not call these layers by their names.",
            stacklevel=3,
        )


def _one_alpha(modules: Mapping[str, NSRULinear]) -> float:
    """The ``lora_alpha`` of a folder. B takes up what the modules' own alphas differ by: many who
    serve adapters know no ``alpha_pattern``."""
    first = next(iter(modules.values()))
    alike = all(module.alpha == first.alpha for module in modules.values())
    return first.alpha if alike and first.alpha else float(first.rank)


def _config(model: nn.Module, modules: dict[str, NSRULinear], alpha: float) -> dict[str, Any]:
    first, experts = next(iter(modules.values())), _of_experts(modules)
    ranks = {name: module.rank for name, module in modules.items()}
    rank = statistics.mode(ranks.values())  # PEFT's hotswap_adapter reads nothing but r
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": _base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "target_modules": [name for name in modules if name not in experts],
        **({"target_parameters": experts} if experts else {}),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": all(_is_conv1d(module) for module in modules.values()),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _task(model: nn.Module) -> str | None:
    """Of PEFT, whose classes for language models hand on input_ids and read more of the model."""
    reads = getattr(model, "main_input_name", "input_ids")
    if not hasattr(model, "prepare_inputs_for_generation") or reads != "input_ids":
        return None
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if both else "CAUSAL_LM"


def _base_name(model: nn.Module) -> str | None:
    """Hub id of a model, also of one from a snapshot in the hub's cache; else its folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    snapshot = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", name)
    return snapshot[1].replace("--", "/", 1) if snapshot else name or None


def _of_experts(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of those that stand for a parameter of experts, in model order."""
    return [n for n, m in modules.items() if isinstance(m, (ExpertLinear, NSRUExpertLinear))]


def _names_in_peft(parameters: Iterable[str]) -> dict[str, str]:
    """Parameter → the name of its adapter: PEFT wraps their module once for each, in turn."""
    names: dict[str, str] = {}
    for parameter in reversed(list(parameters)):
        name = parameter.rpartition(".")[0]
        while name in names.values():
            name += ".base_layer"
        names[parameter] = name
    return names


def _is_conv1d(module: NSRULinear) -> bool:
    """True where PEFT has to be told that W is stored [K, N]."""
    return type(getattr(module, "base_layer", None)).__name__ == "Conv1D"


def _pattern(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Values other than the default, by keys that fit one module only, in whatever order.

    PEFT reads them as regular expressions for the end of a name.
    """

    def key(name: str) -> str:
        with contextlib.suppress(re.error):
            fits = re.compile(rf"(.*\.)?({name})$")
            if [one for one in values if fits.match(one)] == [name]:
                return name
        return f"^{re.escape(name)}"

    return {key(name): value for name, value in values.items() if value != default}


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a PEFT LoRA folder.

    Raises:
        ValueError: a file is missing, truncated or not LoRA; the message names it.
    """
    folder = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter: {folder} has no {file}; expected a folder that save_lora_adapter wrote."
            )
    config = read_json(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {folder} is {config.get('peft_type')!r}, expected 'LORA'.")
    return config, tensors


@torch.no_grad()
def load_lora_adapter(model: nn.Module, path: str | os.PathLike[str]) -> SwapReport:
    """Swap the linears that a plain LoRA adapter names and give them its A and B; A is Ā, no basis.

    Ranks and alphas of single modules and rank-stabilised scaling are read as PEFT reads them.

    Args:
        model: the base model, changed in place.
        path: a folder in PEFT's format, by ``save_lora_adapter`` or PEFT.

    Returns:
        the swap report.

    Raises:
        ValueError: damaged files, values that are not finite, unsupported LoRA variants, or an
            adapter of another model. The model is then as it was.
    """
    config, tensors = read_adapter(path)
    folder, model = Path(path), unwrap(model)
    try:
        found = adaptable_layers(model)
        actual = {plain_name(name): name for name in found}
        layers = {plain_name(name): layer for name, layer in found.items()}
        adapters = _adapters(tensors, config, layers)
        ranks, alphas = _sizes(folder / CONFIG, config, adapters, layers)
        for name, (a_RK, b_NR) in adapters.items():
            _check_fit(layers, name, a_RK, b_NR)
        check_fingerprint(model, folder / SIDECAR)
        own, adapters = _own_scales(folder / SIDECAR, adapters, alphas)
        first = next(iter(adapters))
        report = swap_linears(
            model,
            [actual[name] for name in adapters],
            rank=ranks[first],
            alpha=own[first],
            rank_pattern=_exactly({actual[name]: rank for name, rank in ranks.items()}),
            alpha_pattern=_exactly({actual[name]: alpha for name, alpha in own.items()}),
        )
    except ValueError as error:
        raise ValueError(f"adapter: {folder}: {error}") from error
    for name, (a_RK, b_NR) in adapters.items():
        module = model.get_submodule(actual[name])
        assert isinstance(module, NSRULinear)
        module.lora_A.copy_(a_RK)
        module.lora_B.copy_(b_NR)
    return report


@torch.no_grad()
def copy_lora_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give the ``NSRULinear``s of a model A and B of a plain LoRA adapter, to train it further.

    Unlike `load_lora_adapter` it keeps their retain subspaces; A is in their null space already if
    the adapter was trained there. Of a model that ``fully_shard`` has sharded every rank makes the
    call.

    Args:
        model: has the modules that the adapter names, and no others, of its ranks and alphas.
        path: a folder in PEFT's format.

    Raises:
        ValueError: damaged files, or other modules, ranks or alphas. The model is then as it was.
    """
    config, tensors = read_adapter(path)
    folder, found = Path(path), unwrap(model).named_modules()
    modules = {plain_name(name): m for name, m in found if isinstance(m, NSRULinear)}
    try:
        adapters = _adapters(tensors, config, modules)
        ranks, alphas = _sizes(folder / CONFIG, config, adapters, modules)
        own, adapters = _own_scales(folder / SIDECAR, adapters, alphas)
        if odd := sorted(adapters.keys() ^ modules.keys()):
            raise ValueError(f"it and the model's adapters differ in {odd[0]}; same targets?")
        for name, module in modules.items():
            if ranks[name] != module.rank or not math.isclose(own[name], module.alpha):
                raise ValueError(
                    f"{name} has rank {ranks[name]} and alpha {own[name]:g}, the model's "
                    f"{module.rank} and {module.alpha:g}; use the settings that it was made with."
                )
    except ValueError as error:
        raise ValueError(f"adapter: {folder}: {error}") from error
    reshard(unwrap(model))
    for name, (a_RK, b_NR) in adapters.items():
        module = modules[name]
        module.lora_A.copy_(shards_like(a_RK, module.lora_A))
        module.lora_B.copy_(shards_like(b_NR, module.lora_B))


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, and what stands for the parameters of experts, of a base model."""
    return {
        own: layer
        for name, module in model.named_modules(remove_duplicate=False)
        for own, layer in {name: module, **expert_linears(name, module)}.items()
    }


def adapted_names(config: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of an adapter in PEFT's file → the parameter of experts that it is for.

    Args:
        config: of the adapter's folder.
        layers: name → module, those of experts among them, of the base model or a swapped one.
    """
    parameters = [name for name in _of_experts(layers) if _is_target_parameter(name, config)]
    return {own: name for name, own in _names_in_peft(parameters).items()}


def _is_target_parameter(parameter: str, config: Mapping[str, Any]) -> bool:
    """True where PEFT finds it by the names or ends of names in target_parameters."""
    targets = config.get("target_parameters") or []
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _adapters(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: Mapping[str, nn.Module]
) -> dict[str, Factors]:
    """Module name → (A, B) of an adapter's file."""
    # PEFT keeps the weight of an adapted head or embedding beside them.
    kept = {key: key.removeprefix(_PREFIX).removesuffix(_BASE) for key in tensors if _BASE in key}
    for entry, name in kept.items():
        own = getattr(layers.get(name), "weight", None)
        if own is not None and not torch.equal(tensors[entry].to(own.dtype), own.cpu()):
            raise ValueError(f"{entry} is not the model's own weight; load it with PEFT.")
    tensors = {entry: tensor for entry, tensor in tensors.items() if entry not in kept}
    names = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors})
    key = (_PREFIX + "{}.lora_{}.weight").format
    expected = {key(name, side) for name in names for side in "AB"}
    if not names or expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())[:1]
        raise ValueError(f"expected lora_A and lora_B of each module, check {odd}. {_TRANSLATED}")
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be a matrix of floats, got {tuple(tensor.shape)} {tensor.dtype}."
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values: training diverged, or the file is damaged. "
                "Train again, or take an earlier checkpoint."
            )
    of_experts = adapted_names(config, layers)
    found = {
        of_experts.get(name, name): (tensors[key(name, "A")], tensors[key(name, "B")])
        for name in names
    }
    if missing := sorted(set(of_experts.values()) - found.keys()):
        raise ValueError(f"{CONFIG} names {missing[0]}, for which {WEIGHTS} has nothing.")
    return found


def _sizes(
    file: Path,
    config: Mapping[str, Any],
    adapters: Mapping[str, Factors],
    layers: Mapping[str, nn.Module],
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each module by PEFT's rules, alpha so that it is divided by the rank."""
    from peft import LoraConfig

    config = {**_DEFAULTS, **{k: value for k, value in config.items() if value is not None}}
    check_fields(file, config, _FIELDS)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if unknown := sorted(config.keys() - known):
        warnings.warn(
            f"adapter: {file} has {unknown[0]!r}, which this version of PEFT does not know: it is "
            "not heeded, here as there. Was the adapter made by a newer one?",
            stacklevel=4,
        )
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"{option}={config[option]!r} is not supported; load it with PEFT.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise ValueError(f"init_lora_weights={start!r} is not supported; load it with PEFT.")
    if config["bias"] != "none":
        raise ValueError("trained biases are not supported; load it with PEFT.")
    found = _found_by_peft(config)
    for name in adapters.keys() - set(_of_experts(layers)):
        if _is_target_parameter(f"{name}.weight", config):
            layer = layers.get(name)
            kind = type(getattr(layer, "base_layer", layer)).__name__
            # A Conv1D holds the transpose of W, a router is no linear layer.
            if layer is not None and (kind == "Conv1D" or linear_sizes(layer) == (0, 0)):
                raise ValueError(f"target_parameters of a {kind}, {name}: load it with PEFT.")
        elif not found(name):
            raise ValueError(
                f"{WEIGHTS} has {name}, which {' or '.join(_RULES)} in {CONFIG} leave out, and so "
                "would PEFT; give the folder back the config that it was saved with."
            )
    ranks = by_pattern(config["rank_pattern"], adapters, config["r"])
    alphas = by_pattern(config["alpha_pattern"], adapters, config["lora_alpha"])
    for name, (a_RK, b_NR) in adapters.items():
        experts = getattr(layers.get(name), "num_experts", 1)
        if not a_RK.shape[0] == b_NR.shape[1] == ranks[name] * experts:
            each = f" for each of {experts} experts" if experts > 1 else ""
            raise ValueError(
                f"{name} has rank {a_RK.shape[0]} (A) and {b_NR.shape[1]} (B), {CONFIG} says "
                f"{ranks[name]}{each}."
            )
    if config["use_rslora"]:
        alphas = {name: alpha * math.sqrt(ranks[name]) for name, alpha in alphas.items()}
    return ranks, alphas


def _found_by_peft(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """True of the modules that PEFT would find by names, expressions and layers of the config."""
    from peft.tuners.tuners_utils import check_target_module_exists

    given = {option: config.get(option) for option in _RULES}
    rules = {option: value for option, value in given.items() if value not in (None, "", [])}
    for option, value in rules.items():
        kind = int if option == "layers_to_transform" else str
        values = value if isinstance(value, list) else [value]
        if not all(type(one) is kind for one in values):
            wanted = "names or an expression" if kind is str else "numbers of layers"
            raise ValueError(f"{option} must be {wanted}, got {value!r:.60}.")
        # In a list of targets PEFT looks for names.
        named = isinstance(value, list) and option != "layers_pattern"
        expressions = [] if named or kind is int else values
        try:
            for one in expressions:
                re.compile(one)
        except re.error as error:
            raise ValueError(f"{option}: {value!r} is no regular expression: {error}.") from error
    rules = {**dict.fromkeys(_RULES), **rules}
    of_layers = rules["layers_to_transform"] is not None
    if rules["layers_pattern"] and not of_layers:
        raise ValueError("layers_pattern needs layers_to_transform beside it, as in PEFT.")
    if of_layers and isinstance(rules["target_modules"], str):
        raise ValueError(
            f"layers_to_transform goes with a list of target_modules, as in PEFT, got "
            f"{rules['target_modules']!r}."
        )
    if rules["target_modules"] in (None, "all-linear"):
        rules["target_modules"] = ".*"
    return lambda name: bool(check_target_module_exists(SimpleNamespace(**rules), name))


def _own_scales(
    sidecar: Path, adapters: dict[str, Factors], alphas: dict[str, float]
) -> tuple[dict[str, float], dict[str, Factors]]:
    """The alphas that the modules had when they were saved, where ``nsru.json`` says so, and the
    adapters with B for them."""
    found = read_json(sidecar).get("alphas") if sidecar.is_file() else None
    if found is None:
        return alphas, adapters
    check_fields(sidecar, {"alphas": found}, {"alphas": dict[str, float]})
    own = {name: float(found.get(name) or alpha) for name, alpha in alphas.items()}
    scaled = {
        name: (a_RK, b_NR * (alphas[name] / own[name])) for name, (a_RK, b_NR) in adapters.items()
    }
    for name, (_, b_NR) in scaled.items():
        if not torch.isfinite(b_NR).all() or b_NR.any() != adapters[name][1].any():
            raise ValueError(
                f"{sidecar.name} says that {name} had alpha {own[name]:g}, which is no scale for "
                f"its B; expected one near {alphas[name]:g}. Damaged?"
            )
    return own, scaled


def _exactly(values: Mapping[str, Value]) -> dict[str, Value]:
    """A pattern that gives each of these modules its value and no other."""
    return {rf"^{re.escape(name)}": value for name, value in values.items()}


def _check_fit(layers: Mapping[str, nn.Module], name: str, a_RK: Tensor, b_NR: Tensor) -> None:
    if name not in layers:
        raise ValueError(f"the model has no module {name!r}; another base? {_TRANSLATED}")
    module = layers[name]
    shape = tuple(module.weight.shape) if is_plain(module) else linear_sizes(module)[::-1]
    if shape != (b_NR.shape[0], a_RK.shape[1]):
        raise ValueError(
            f"{name} is made for a weight of {(b_NR.shape[0], a_RK.shape[1])}, "
            f"the model has {shape}; another base?"
        )


def check_fingerprint(model: nn.Module, sidecar: Path) -> bool:
    """Raise ValueError when ``nsru.json`` says that the adapter was trained on other weights.

    Returns:
        Whether they could be compared: it says which ones, and the model's are all here.
    """
    from nsru_kernels.subspaces.collection import dtype_hint, fingerprint_weights

    if not sidecar.is_file():
        return False
    wanted = read_json(sidecar).get("fingerprint")
    if not _are_whole(model):
        return False
    if wanted is not None and (found := fingerprint_weights(model)) != wanted:
        raise ValueError(
            f"it was trained on weights with fingerprint {wanted}, the model has {found}; load the "
            f"base model that it was trained on.{dtype_hint(model, str(wanted))}"
        )
    return wanted is not None
