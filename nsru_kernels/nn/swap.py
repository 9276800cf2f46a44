"""Swap a model's linear layers for ``NSRULinear``; say what was swapped, what was not, and why."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nsru_kernels.nn.basis import RetainBasis
from nsru_kernels.nn.fold_cache import FoldCache
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.siblings import Siblings

ALL_LINEAR = "all-linear"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class SwapReport:
    """What ``swap_linears`` did.

    Attributes:
        swapped: module names, in model order.
        skipped: name → reason, for every linear layer that was left as it was.
        retain_ranks: name → Q of its basis, 0 for plain LoRA.
        trainable: number of adapter parameters.
        frozen: number of all other parameters.
        siblings: the handles of linears that may read the same input. Their ``status()``, and so
            this report's text, is live: print it again after a forward.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    retain_ranks: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    frozen: int = 0
    siblings: list[Siblings] = field(default_factory=list, repr=False, compare=False)

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
        together = Counter(state for handle in self.siblings for state in handle.status())
        lines += [f"  {names} × {count} {state}" for (names, state), count in together.items()]
        left = Counter((name.rpartition(".")[2], reason) for name, reason in self.skipped.items())
        lines += [f"  not swapped: {kind} × {n} ({reason})" for (kind, reason), n in left.items()]
        return "\n".join(lines)


def swap_linears(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    rank: int,
    alpha: float,
    subspaces: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    siblings: bool = True,
    backend: str = "auto",
) -> SwapReport:
    """Replace linear layers in place by ``NSRULinear`` and freeze every other parameter.

    Save the result with ``save_lora_adapter``, or ``merge_adapters`` and ``save_pretrained``;
    transformers alone would read a swapped model back without its adapters. Weights are taken over,
    not copied. Linears that share one subspace object share one basis
    tensor. Nothing is changed unless everything fits.

    Args:
        model: any ``nn.Module``; for a transformers model the output embedding is left alone.
        targets: "all-linear", or full names ("model.layers.0.self_attn.q_proj") or their ends
            ("q_proj").
        rank: R of every adapter.
        alpha: updates are scaled by alpha / rank.
        subspaces: from ``estimate_retain_subspaces``: module name → ``RetainSubspace`` (or a basis
            tensor [K, Q]), one for every target. None: plain LoRA.
        dropout: LoRA dropout.
        siblings: whether linears that read the same tensor (q/k/v, gate/up) may be served together
            from the second forward on. They then share one backward: going back from one output
            at a time needs retain_graph=True, or siblings=False.
        backend: "auto", "eager", "cpu", "triton" or "cuda".
    Returns:
        the report; print it.
    Raises:
        ValueError: a target matches nothing (the closest names are given) or a layer that cannot be
            swapped, a subspace is missing or of another size or from another model, or the model is
            already swapped, wrapped by PEFT, or a linear layer itself.
        TypeError: an entry of ``subspaces`` has no basis tensor.
    """
    _refuse_adapted(model)
    linears, skipped = _match(model, targets)
    if subspaces is not None:
        if missing := [name for name, _ in linears if name not in subspaces]:
            raise ValueError(
                f"swap_linears: subspaces has no entry for {len(missing)} of {len(linears)} "
                f"targets, the first {missing[0]!r}. Estimate them with the same targets."
            )
        if hasattr(subspaces, "check_model"):
            subspaces.check_model(model)
    holders: dict[int, RetainBasis] = {}
    folds = FoldCache()
    modules: dict[str, NSRULinear] = {}
    for name, linear in linears:
        trainable_before = [p for p in linear.parameters() if p.requires_grad]
        try:
            holder = None if subspaces is None else _holder(subspaces[name], linear, holders)
            module = NSRULinear.from_linear(
                linear, rank, alpha=alpha, basis=holder, dropout=dropout, backend=backend
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"swap_linears: {name}: {error}") from error
        finally:
            for parameter in trainable_before:
                parameter.requires_grad_(True)
        module._share_folds(folds)
        modules[name] = module
    model.requires_grad_(False)
    for name, module in modules.items():
        replace_module(model, name, module)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return SwapReport(
        swapped=list(modules),
        skipped=skipped,
        retain_ranks={n: 0 if m.basis is None else m.basis.shape[1] for n, m in modules.items()},
        trainable=trainable,
        frozen=sum(p.numel() for p in model.parameters()) - trainable,
        siblings=_introduce_siblings(modules) if siblings else [],
    )


def match_linears(model: nn.Module, targets: str | Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """The linear layers that ``targets`` names, in model order; see ``swap_linears``.

    Raises:
        ValueError: a target matches no linear layer that can be swapped.
    """
    return _match(model, targets)[0]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _introduce_siblings(modules: Mapping[str, NSRULinear]) -> list[Siblings]:
    """One handle for all that may read the same input: one parent, in_features and basis."""
    candidates: dict[tuple, list[tuple[str, NSRULinear]]] = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        key = (parent, module.in_features, id(module.retain))
        candidates.setdefault(key, []).append((child, module))
    handles = []
    for family in candidates.values():
        if len(family) > 1:
            handles.append(Siblings())
            for child, module in family:
                module._join(handles[-1], child)
    return handles


def _holder(subspace: Any, linear: nn.Linear, holders: dict[int, RetainBasis]) -> RetainBasis:
    """The one holder of this subspace's basis, on the device of the first linear that asks."""
    if id(subspace) not in holders:
        basis = getattr(subspace, "basis", subspace)
        if not isinstance(basis, Tensor):
            raise TypeError(
                f"expected a RetainSubspace or a tensor [K, Q], got {type(subspace).__name__}."
            )
        holders[id(subspace)] = RetainBasis(basis).to(linear.weight.device)
    return holders[id(subspace)]


def _match(
    model: nn.Module, targets: str | Sequence[str]
) -> tuple[list[tuple[str, nn.Linear]], dict[str, str]]:
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError("targets must name at least one linear layer, got an empty list.")
    if _looks_linear(model):
        raise ValueError("model is a linear layer itself; use NSRULinear.from_linear.")
    # What a swap or a merge of one layer would silently miss or change in another place.
    places = Counter(id(child) for m in model.modules() for child in m._modules.values())
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    matched: list[tuple[str, nn.Linear]] = []
    skipped: dict[str, str] = {}
    hits: Counter[str] = Counter()
    linear_names: list[str] = []
    for name, module in model.named_modules():
        if not _looks_linear(module):
            continue
        linear_names.append(name)
        named = [t for t in wanted if t != ALL_LINEAR and (name == t or name.endswith("." + t))]
        reason = _cannot_swap(module)
        if reason is None and places[id(module)] > 1:
            reason = "the same module stands in several places; give each its own"
        if reason is None and users[id(module.weight)] > 1:
            reason = "its weight is tied to another module; a merge would change both, untie them"
        if not named and ALL_LINEAR not in wanted:
            reason = "not among the targets"
        elif not named and module is head:
            reason = "output embedding; name it to swap it"
        elif reason and named:
            raise ValueError(
                f"target {named[0]!r} matches {name}, which cannot be swapped: {reason}."
            )
        if reason:
            skipped[name] = reason
            continue
        hits.update({*named, ALL_LINEAR})
        matched.append((name, module))
    for target in wanted:
        if not hits[target]:
            raise ValueError(_no_match(target, linear_names, skipped))
    return matched, skipped


def _looks_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cannot_swap(module: nn.Module) -> str | None:
    if nn.utils.parametrize.is_parametrized(module):
        return "has a parametrization; remove it first"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear; only those are supported"
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weights during forward; load the model without offloading"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks, which a swap would drop; remove them first"
    if "forward" in vars(module):
        return "its forward has been replaced, which a swap would drop"
    return None


def _no_match(target: str, linear_names: list[str], skipped: dict[str, str]) -> str:
    if target == ALL_LINEAR and skipped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        return f"target {target!r} matches no linear layer that can be swapped ({reasons})."
    ends = Counter(name.rpartition(".")[2] for name in linear_names)
    pool = linear_names if "." in target else list(ends)
    closest = difflib.get_close_matches(target, pool, n=3, cutoff=0.4)
    counts = [f"{c!r} ({ends[c]} modules)" if c in ends else repr(c) for c in closest]
    known = (
        f"closest: {', '.join(counts)}" if counts else f"linear layers: {', '.join(ends) or 'none'}"
    )
    return f"target {target!r} matches no linear layer; {known}."


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, NSRULinear):
            raise ValueError(
                f"swap_linears: {name} is an NSRULinear already. merge_adapters(model) first."
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"swap_linears: the model is wrapped by PEFT ({name or type(module).__name__}). "
                "Call merge_and_unload() first."
            )
