"""Swap a model's linear layers for ``NSRULinear``; say what was swapped, what was not, and why."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nsru_kernels.nn.experts import (
    ExpertLinear,
    NSRUExpertLinear,
    expert_linears,
    place,
)
from nsru_kernels.nn.group import LinearGroup
from nsru_kernels.nn.inputs import ActivationStream, Batch, evaluating
from nsru_kernels.nn.left_out import (
    cannot_swap,
    entries,
    held_by_hand,
    looks_linear,
    matrices_left,
    refused_by_peft,
    routes,
    shared_memory,
    text_part,
)
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.names import COMPILED, plain_name, unwrap
from nsru_kernels.nn.projections import Projections
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.nn.wrapped import (
    NSRUWrappedLinear,
    is_plain,
    keep_unpacked,
    place_of,
)

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
_EXPRESSION = re.compile(r"[\\^$*+?{}\[\]|()]")  # what names of modules do not hold
_ALONE = (NSRUWrappedLinear, NSRUExpertLinear)  # not computed with those of the same input


@dataclass
class SwapReport:
    """The changes that ``swap_linears`` made.

    Attributes:
        swapped: module names, in model order.
        skipped: name → reason, for every linear layer, and for every module that holds fused
            experts or other matrices, that were left as they were.
        retain_ranks: name → Q of its basis, 0 for plain LoRA.
        trainable: number of adapter parameters.
        frozen: number of all other parameters.
        groups: names of linears that read the same input and are computed together.
        observed: whether it is known which linears read the same input.
        closed: names whose retain basis has full rank: no update is left to train there.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    retain_ranks: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    frozen: int = 0
    groups: list[list[str]] = field(default_factory=list)
    observed: bool = True
    closed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"swapped {len(self.swapped)} linear layers: {self.trainable:,} trainable parameters, "
            f"{self.frozen:,} frozen"
        ]
        kinds = Counter(name.rpartition(".")[2] for name in self.swapped)
        lines += [f"  {kind} × {count}" for kind, count in kinds.items()]
        plain = sum(q == 0 for q in self.retain_ranks.values())
        if plain:
            lines.append(
                f"  {plain} of them without a retain basis: plain LoRA, nothing is projected"
            )
        if self.closed:
            lines.append(
                f"  {len(self.closed)} of them with a retain basis of full rank, such as "
                f"{self.closed[0]}: nothing is trained there; lower the rank"
            )
        ends = ["+".join(name.rpartition(".")[2] for name in group) for group in self.groups]
        lines += [f"  {group} × {n} computed together" for group, n in Counter(ends).items()]
        if not self.observed:
            lines.append(
                "  each computed alone: pass subspaces of estimate_retain_subspaces, or batch=, so "
                "that linears with the same input are known"
            )
        left = Counter((name.rpartition(".")[2], reason) for name, reason in self.skipped.items())
        lines += [f"  not swapped: {kind} × {n} ({reason})" for (kind, reason), n in left.items()]
        return "\n".join(lines)


def swap_linears(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    subspaces: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    siblings: bool = True,
    batch: Batch | None = None,
    backend: str = "auto",
) -> SwapReport:
    """Replace linear layers in place by ``NSRULinear`` and freeze every other parameter.

    Quantised layers, ``Conv1D`` and whatever else computes x Wᵀ + b in a way of its own goes on
    doing so inside a ``NSRUWrappedLinear``. Fused experts of transformers are 3-D parameters and
    get an ``NSRUExpertLinear`` for each; PEFT calls these ``target_parameters``.

    Save the result with ``save_lora_adapter``, or ``merge_adapters`` and ``save_pretrained``;
    transformers alone would read a swapped model back without its adapters. Weights are taken over,
    not copied. Linears that share one subspace object share one basis
    tensor. Nothing is changed unless everything fits.

    Args:
        model: any ``nn.Module``; for a transformers model the output embedding is left alone.
        targets: "all-linear", or full names ("model.layers.0.self_attn.q_proj"), their ends
            ("q_proj"), or regular expressions for full names (r".*layers\\.[0-3]\\..*q_proj").
            "experts" names all fused experts, "experts.down_proj" one of their parameters;
            "all-linear" leaves them out, as in PEFT, and the report gives their share; so it
            does what reads the images of a vision-language model, and routers of experts.
        rank: R of every adapter.
        alpha: updates are scaled by alpha / rank.
        rank_pattern: other ranks for some modules, as in PEFT: name, its end, or a regular
            expression for either → rank; the first key that fits counts.
        alpha_pattern: the same for alpha; see ``SubspaceSet.alphas``.
        exclude: targets to leave alone, named like them.
        subspaces: from ``estimate_retain_subspaces``: module name → ``RetainSubspace`` (or a basis
            tensor [K, Q]), one for every target. None: plain LoRA.
        dropout: LoRA dropout.
        siblings: whether linears that read the same tensor (q/k/v, gate/up) are computed together.
            They then share one backward: going back from one output at a time needs
            retain_graph=True, or siblings=False.
        batch: arguments of one forward of the model, such as input_ids, that show which linears
            read the same tensor, and which ones the model never calls but reads the weight of,
            where an adapter would have no effect. Not needed with subspaces of
            ``estimate_retain_subspaces``, which know both; of a transformers model its own
            dummy_inputs show the second.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Returns:
        the report; print it.

    Raises:
        ValueError: a target matches nothing (the closest names are given) or a layer that cannot be
            swapped, a key of a pattern fits none of them, a subspace is missing or of another size
            or from another model, or the model is already swapped, wrapped by PEFT, or a linear
            layer itself.
        TypeError: an entry of ``subspaces`` has no basis tensor, or an argument is of another kind,
            such as a dict where a number belongs.
    """
    inside = unwrap(model)
    _refuse_adapted(model)
    model = inside
    targets, exclude = names_in("targets", targets), names_in("exclude", exclude)
    for name, value in (("rank", rank), ("alpha", alpha)):
        if isinstance(value, Mapping):
            raise TypeError(
                f"swap_linears: {name} is one number for all targets, got {value!r:.80}; give "
                f"those of single modules as {name}_pattern, and as {name} that of the others."
            )
    if subspaces is not None and not isinstance(subspaces, Mapping):
        raise TypeError(
            "swap_linears: subspaces must map names of modules to their subspaces, got "
            f"{type(subspaces).__name__}; estimate_retain_subspaces returns such a dict."
        )
    linears, skipped = _match(model, targets, exclude, getattr(subspaces, "read_elsewhere", {}))
    if elsewhere := _read_elsewhere(model, dict(linears), batch):
        linears, skipped = _match(model, targets, exclude, {**skipped, **elsewhere})
    skipped |= matrices_left(model, {*dict(linears), *skipped})
    names = [name for name, _ in linears]
    ranks = take_all("swap_linears: rank_pattern", rank_pattern, names, rank)
    alphas = take_all("swap_linears: alpha_pattern", alpha_pattern, names, alpha)
    if subspaces is not None:
        if missing := [name for name, _ in linears if name not in subspaces]:
            remedy = "Estimate them with the same targets"
            if plain_name(missing[0]) in subspaces:
                remedy = "Swap before layers are compiled or wrapped"
            raise ValueError(
                f"swap_linears: subspaces has no entry for {len(missing)} of {len(linears)} "
                f"targets, the first {missing[0]!r}. {remedy}."
            )
        if hasattr(subspaces, "check_model"):
            subspaces.check_model(model)
    families = _families(model, dict(linears), subspaces, batch) if siblings else []
    holders: dict[int, tuple[Any, RetainSubspace]] = {}
    modules: dict[str, NSRULinear] = {}
    for name, linear in linears:
        trainable_before = [p for p in linear.parameters() if p.requires_grad]
        try:
            holder = None if subspaces is None else holder_of(subspaces[name], linear, holders)
            module = _adapt(linear)(
                linear, ranks[name], alpha=alphas[name], dropout=dropout, backend=backend
            )
            module.hold(holder)
        except (TypeError, ValueError) as error:
            raise type(error)(f"swap_linears: {name}: {error}") from error
        finally:
            for parameter in trainable_before:
                parameter.requires_grad_(True)
        modules[name] = module
    model.requires_grad_(False)
    for name, module in modules.items():
        replace_module(model, name, module)
    groups = _join(modules, families or [])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return SwapReport(
        swapped=list(modules),
        skipped=skipped,
        retain_ranks={n: 0 if m.basis is None else m.basis.shape[1] for n, m in modules.items()},
        trainable=trainable,
        frozen=sum(map(entries, model.parameters())) - trainable,
        groups=groups,
        observed=families is not None,
        closed=[n for n, m in modules.items() if _is_full(m.basis)],
    )


def match_linears(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> list[tuple[str, nn.Module]]:
    """The linear layers that ``targets`` names, in model order; see ``swap_linears``.

    Args:
        elsewhere: of ``ActivationStream.read_elsewhere``: linears that cannot be swapped.

    Raises:
        ValueError: a target matches no linear layer that can be swapped.
    """
    return _match(model, targets, exclude, elsewhere or {})[0]


def names_in(argument: str, given: str | Iterable[str]) -> list[str]:
    """Names of linear layers as a list. Raises TypeError: it is no name and no names."""
    names = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(
            f"{argument} must be names of linear layers, or regular expressions for them, got "
            f"{odd[0]!r:.80}."
        )
    return names


def by_pattern(
    pattern: Mapping[str, Value], names: Iterable[str], default: Value
) -> dict[str, Value]:
    """Name → the value that PEFT takes: of the first key that fits the name or its end.

    Raises: ValueError: a key is no regular expression.
    """
    expressions = {}
    for key, value in pattern.items():
        try:
            expressions[re.compile(rf"(.*\.)?({key})$")] = value
        except re.error as error:
            raise ValueError(f"{key!r} is no regular expression: {error}.") from error
    return {
        name: next((value for e, value in expressions.items() if e.match(name)), default)
        for name in names
    }


def _is_full(basis_KQ: Tensor | None) -> bool:
    return basis_KQ is not None and basis_KQ.shape[1] == basis_KQ.shape[0]


def replace_module(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put ``module``, or the parameter of experts that one stood for, in the place ``name``."""
    parent, _, child = name.rpartition(".")
    place(model.get_submodule(parent), child, module)


def _adapt(linear: nn.Module) -> Callable[..., NSRULinear]:
    """The maker of the layer that takes this one's place."""
    if isinstance(linear, ExpertLinear):
        return NSRUExpertLinear
    return NSRULinear.from_linear if is_plain(linear) else NSRUWrappedLinear


def _read_elsewhere(
    model: nn.Module, linears: Mapping[str, nn.Module], batch: Batch | None
) -> dict[str, str]:
    stream = ActivationStream(model, linears)
    if batch is not None:
        return stream.read_elsewhere(batch)
    with contextlib.suppress(Exception):  # there may be none, and they do not suit every model
        return stream.read_elsewhere(getattr(model, "dummy_inputs", {}))
    return {}


def _families(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    subspaces: Mapping[str, Any] | None,
    batch: Batch | None,
) -> list[list[str]] | None:
    """Names of the linears that read the same tensor; None where nobody has looked."""
    if batch is not None:
        with evaluating(model):
            return ActivationStream(model, linears).group_by_input(batch)
    inputs = getattr(subspaces, "inputs", None)
    return None if inputs is None else [entry.modules for entry in inputs]


def _join(modules: Mapping[str, NSRULinear], families: list[list[str]]) -> list[list[str]]:
    """Put every module into its group, all under one cache; the groups of several, by name."""
    projections, groups = Projections(), []
    single = dict(modules)
    for family in families:
        # Of one parent, for cross-attention reads one tensor in all layers, with others in between.
        parts: dict[tuple, list[str]] = {}
        for name in family:
            if name in single and not isinstance(single[name], _ALONE):
                module, parent = single[name], name.rpartition(".")[0]
                key = (parent, id(module.subspace), module.weight.dtype)
                parts.setdefault(key, []).append(name)
        for names in parts.values():
            if len(names) > 1:
                groups.append(names)
                group = LinearGroup(projections)
                for name in names:
                    single.pop(name).join(group)
    for module in single.values():
        module.join(LinearGroup(projections))
    return groups


def holder_of(
    subspace: Any, linear: nn.Module, holders: dict[int, tuple[Any, RetainSubspace]]
) -> RetainSubspace:
    """The one holder of this subspace's basis, on the device of the first linear that asks."""
    if id(subspace) not in holders:
        basis = getattr(subspace, "basis", subspace)
        if not isinstance(basis, Tensor):
            raise TypeError(
                f"expected a RetainSubspace or a tensor [K, Q], got {type(subspace).__name__}."
            )
        own = subspace.share() if isinstance(subspace, RetainSubspace) else RetainSubspace(basis)
        # With the object itself, so that no other takes over its identity.
        holders[id(subspace)] = subspace, own.to(place_of(linear)[0])
    return holders[id(subspace)][1]


def take_all(
    argument: str, pattern: Mapping[str, Value] | None, names: list[str], default: Value
) -> dict[str, Value]:
    """``by_pattern``, where a key that no target takes is a mistake.

    Raises: ValueError: there is one, or it is no regular expression. TypeError: it is no name.
    """
    pattern = {} if pattern is None else pattern
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise TypeError(f"{argument} must map names of modules to numbers, got {pattern!r:.80}.")
    try:
        keys = by_pattern({key: key for key in pattern}, names, None)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    if unused := sorted(pattern.keys() - set(keys.values())):
        closest = difflib.get_close_matches(unused[0], names, n=1, cutoff=0)
        raise ValueError(
            f"{argument} has {unused[0]!r}, which no target takes: none fits, or an "
            f"earlier key does first; closest: {closest}."
        )
    return {name: default if key is None else pattern[key] for name, key in keys.items()}


def _names(target: str, name: str) -> bool:
    """True where a target or an exclusion means this module."""
    if not _EXPRESSION.search(target):
        return name == target or name.endswith("." + target)
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"target {target!r} is no regular expression: {error}.") from error


def _names_experts(target: str, name: str) -> bool:
    """The same for a parameter of experts: by their module's name, or more than its own."""
    return _names(target, name.rpartition(".")[0]) or ("." in target and _names(target, name))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if looks_linear(module):
            yield name, module
        yield from expert_linears(name, module).items()


def _match(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    elsewhere: Mapping[str, str],
) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    linears = dict(_linears(model))
    wanted, unwanted = (
        # A full name means that layer, whatever it would mean as an expression.
        [re.escape(t) if t in linears and _EXPRESSION.search(t) else t for t in names_in(*given)]
        for given in (("targets", targets), ("exclude", exclude))
    )
    if not wanted:
        raise ValueError("targets must name at least one linear layer, got an empty list.")
    if ALL_LINEAR in unwanted:
        raise ValueError(f"exclude must name linear layers, got {ALL_LINEAR!r}: it leaves none.")
    if looks_linear(model):
        raise ValueError("model is a linear layer itself; use NSRULinear.from_linear.")
    keep_unpacked(model)
    # Layers that a swap or a merge would silently miss, or change in another place.
    places = Counter(id(child) for m in model.modules() for child in m._modules.values())
    shared, held = shared_memory(model), held_by_hand(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    text = text_part(model)
    refused = refused_by_peft(model, linears)
    matched: list[tuple[str, nn.Module]] = []
    skipped: dict[str, str] = {}
    hits: Counter[str] = Counter()
    for name, module in linears.items():
        of_experts = isinstance(module, ExpertLinear)
        means = _names_experts if of_experts else _names
        named = [t for t in wanted if t != ALL_LINEAR and means(t, name)]
        excluded = [t for t in unwanted if means(t, name)]
        if of_experts and not named and not excluded:
            continue  # and reported for the layer
        reason = cannot_swap(module)
        if reason is None and name.endswith(COMPILED):
            reason = "is compiled by itself and would go on as it is; compile after swapping"
        if reason is None and places[id(getattr(module, "experts", module))] > 1:
            reason = "the same module stands in several places; give each its own"
        if reason is None and id(module) in held:
            reason = f"{held[id(module)]} holds it too, and would go on calling it as it is"
        if reason is None and id(getattr(module, "weight", None)) in shared:
            reason = "its weight is tied to another module; a merge would change both, untie them"
        if not of_experts:
            reason = reason or refused.get(name) or elsewhere.get(name)
        hits.update(excluded)
        if excluded and (named or ALL_LINEAR in wanted):
            hits.update({*named, ALL_LINEAR})
            reason = "excluded"
        elif not named and ALL_LINEAR not in wanted:
            reason = "not among the targets"
        elif not named and module is head:
            reason = "output embedding; name it to swap it"
        elif not named and text is not None and module not in text:
            reason = "outside of the text part; name it to swap it"
        elif not named and routes(model, name):
            reason = "router of experts; name it to swap it"
        elif reason and named:
            raise ValueError(
                f"target {named[0]!r} matches {name}, which cannot be swapped: {reason}."
            )
        if reason:
            skipped[name] = reason
            continue
        hits.update({*named, ALL_LINEAR})
        matched.append((name, module))
    for target in wanted + unwanted:
        if not hits[target]:
            for name, reason in matrices_left(model, ()).items():
                if target in wanted and target != ALL_LINEAR and _names(target, name):
                    raise ValueError(
                        f"target {target!r} matches {name}, which cannot be swapped: {reason}."
                    )
            what = "target" if target in wanted else "exclude"
            raise ValueError(f"{what} {_no_match(target, [*linears], skipped)}")
    if not matched:
        raise ValueError(f"exclude={unwanted} leaves none of the targets {wanted}.")
    return matched, skipped


def _no_match(target: str, linear_names: list[str], skipped: dict[str, str]) -> str:
    if target == ALL_LINEAR and skipped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        return f"{target!r} matches no linear layer that can be swapped ({reasons})."
    ends = Counter(name.rpartition(".")[2] for name in linear_names)
    if target in ends:
        name = next(name for name in linear_names if name.endswith(f".{target}"))
        full = ".".join(name.split(".")[-2:])
        return f"{target!r} matches no linear layer; for that of fused experts write {full!r}."
    pool = linear_names if "." in target else list(ends)
    closest = difflib.get_close_matches(target, pool, n=3, cutoff=0.4)
    counts = [f"{c!r} ({ends[c]} modules)" if c in ends else repr(c) for c in closest]
    known = (
        f"closest: {', '.join(counts)}" if counts else f"linear layers: {', '.join(ends) or 'none'}"
    )
    return f"{target!r} matches no linear layer; {known}."


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, NSRULinear):
            raise ValueError(
                f"swap_linears: {name} is an NSRULinear already. merge_adapters(model) first."
            )
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "swap_linears: the model is wrapped by DistributedDataParallel, which would not "
                "average the gradients of adapters that come later. Swap first, then wrap."
            )
    remedy = "Call merge_and_unload() first, or constrain_peft in place of swap_linears."
    refuse_peft("swap_linears", model, remedy)


def refuse_peft(function: str, model: nn.Module, remedy: str) -> None:
    """Raise ValueError where the model, or a layer of it, is PEFT's."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            what = name or type(module).__name__
            raise ValueError(f"{function}: the model is wrapped by PEFT ({what}). {remedy}")
