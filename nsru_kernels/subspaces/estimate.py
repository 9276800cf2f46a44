"""estimate_retain_subspaces: stream a model's retain activations into one sketch per input."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsru_kernels.checks import check_range
from nsru_kernels.nn.experts import standing_in
from nsru_kernels.nn.inputs import (
    ActivationStream,
    Batches,
    Consumer,
    check_iterable,
    evaluating,
    is_distributed,
    with_first,
    with_progress,
)
from nsru_kernels.nn.names import unwrap
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.nn.swap import match_linears, names_in, refuse_peft
from nsru_kernels.nn.wrapped import linear_sizes, place_of
from nsru_kernels.subspaces.collection import InputDiagnostics, SubspaceSet, fingerprint_weights
from nsru_kernels.subspaces.distributed import communication_device
from nsru_kernels.subspaces.sketch import MIN_ENERGY, RetainSketch, lifted

# Names of modules by their input, and the reasons by name of those that are read elsewhere.
Agreed = tuple[list[list[str]], dict[str, str]]


def estimate_retain_subspaces(
    model: nn.Module,
    batches: Batches,
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    width: int,
    rank: int | None = None,
    energy: float | None = None,
    forget_batches: Batches | None = None,
    min_editability: float | None = None,
    unit_tokens: bool = False,
    refresh_every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SubspaceSet:
    """Top eigenvectors of XᵀX for the input X of every target, over the tokens of `batches`.

    Linears that read the same tensor (q/k/v, gate/up) share one sketch and one subspace; a first
    forward finds them. The model runs in eval mode without gradients, and is left as it was found.
    In an initialised process group every rank passes its own share of the batches (none is fine)
    and all get the subspaces of the whole.

    Args:
        model: the model before `swap_linears`, or before PEFT wraps it.
        batches: arguments of the model, dicts (`input_ids` and such), tuples in the order of its
            `forward`, or its only tensor; read once, one batch in memory. Calls of the model by
            what makes the batches, or by other threads, are not counted.
            `attention_mask` [B, T] keeps padding out. An optional `token_mask` [B, T] is not passed
            to the model and takes the mask's place here, for instance to leave out an attention
            sink, whose massive norm dominates energy thresholds. `labels` are dropped.
        targets: as for `swap_linears`.
        exclude: likewise.
        width: L of each sketch; at least `rank`, better rank + 64.
        rank: the same rank for every input.
        energy: for every input the smallest rank with this certified share of the energy.
        forget_batches: like `batches`; adds editability to the diagnostics, the share
            ‖P x‖²/‖x‖² of forget activation energy that the projector leaves open.
        min_editability: for every input the largest rank with at least this editability, and at
            least 1, so that no input is left unprotected.
        unit_tokens: scale every token to norm 1 first. One token with a massive activation, often
            the first of a sequence, can otherwise hold all but a thousandth of an input's energy.
        refresh_every: as for `RetainSketch`.
        seed: likewise.
        progress: show progress bars (needs tqdm).

    Returns: a SubspaceSet, module name → RetainSubspace, with `.inputs` and `.table()`.

    Raises:
        ValueError: not exactly one of rank, energy, min_editability; a rank that an input cannot
            hold; an empty retain or forget set; NaN or infinite activations; a target without a
            match, or one that no batch reached; a model that PEFT has wrapped.
        TypeError: batches that hold no tensors.
    """
    check_iterable("batches", batches)
    if forget_batches is not None:
        check_iterable("forget_batches", forget_batches)
    model = unwrap(model)
    refuse_peft(
        "estimate_retain_subspaces", model, "Estimate before PEFT wraps it, or merge_and_unload()."
    )
    targets, exclude = names_in("targets", targets), names_in("exclude", exclude)
    linears = dict(match_linears(model, targets, exclude))
    _check_request(linears, width, rank, energy, min_editability, forget_batches is not None)
    with evaluating(model), contextlib.ExitStack() as stack:
        first, batches = with_first(batches)
        elsewhere: dict[str, str] = {}
        if first is not None:
            elsewhere = ActivationStream(model, linears).read_elsewhere(first)
            linears = dict(match_linears(model, targets, exclude, elsewhere))
        stack.enter_context(standing_in(linears))
        stream = ActivationStream(model, linears)
        groups, elsewhere = _agree(
            None if first is None else (stream.group_by_input(first), elsewhere)
        )
        linears = {name: linears[name] for name in linears if name not in elsewhere}
        sketches = {
            modules[0]: RetainSketch(
                linear_sizes(linears[modules[0]])[0],
                width,
                refresh_every=refresh_every,
                seed=seed + index,
                device=_device_of(linears[modules[0]], stream.device),
            )
            for index, modules in enumerate(groups)
        }
        prepare = _unit if unit_tokens else _as_it_is
        consumers = {name: prepare(sketch.update) for name, sketch in sketches.items()}
        stream.feed(batches, consumers, "retain activations" if progress else None, groups)
        if is_distributed():
            for sketch in sketches.values():
                sketch.all_reduce()
        _check_reached(sketches)
        found: Any = sketches.items()
        if progress:
            found = with_progress(list(found), "retain subspaces", "input")
        wholes = {name: sketch.finalize() for name, sketch in found}
        open_shares: dict[str, list[float]] = {}
        if forget_batches is not None:
            forget = {name: _ForgetEnergy(name, whole) for name, whole in wholes.items()}
            consumers = {name: prepare(energies.update) for name, energies in forget.items()}
            stream.feed(
                forget_batches, consumers, "forget activations" if progress else None, groups
            )
            open_shares = {name: energies.editability() for name, energies in forget.items()}

    subspaces: dict[str, RetainSubspace] = {}
    inputs = []
    for modules in groups:
        whole, shares = wholes.pop(modules[0]), open_shares.get(modules[0])
        subspace = _truncate(whole, rank, energy, min_editability, shares)
        subspaces.update(dict.fromkeys(modules, subspace))
        inputs.append(
            InputDiagnostics(
                name=modules[0],
                modules=modules,
                in_features=subspace.in_features,
                rank=subspace.rank,
                captured_energy=subspace.captured_energy,
                editability=shares[subspace.rank] if shares else None,
                rank_limited=subspace.rank_limited,
                tokens=subspace.tokens,
                spectrum=whole.spectrum(),
                editability_by_rank=shares,
            )
        )
    ordered = {name: subspaces[name] for name in linears if name in subspaces}
    return SubspaceSet(ordered, inputs, fingerprint_weights(model), elsewhere)


def _as_it_is(consume: Consumer) -> Consumer:
    return consume


def _unit(consume: Consumer) -> Consumer:
    """Hand on every token scaled to norm 1; a token that is 0 stays 0, NaN and inf stay bad."""

    def scaled(x: Tensor, keep: Tensor | None) -> None:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        consume((wide / norm.clamp_min(torch.finfo(torch.float32).tiny)).to(x.dtype), keep)

    return scaled


class _ForgetEnergy:
    """‖X_f u_i‖² for every direction of a subspace, and ‖X_f‖²_F, summed over the forget set."""

    def __init__(self, name: str, subspace: RetainSubspace) -> None:
        self.name = name
        self.basis_KQ = subspace.basis
        # The last entries are ‖X_f‖²_F and the tokens: one tensor to reduce over ranks.
        self.energy = self.basis_KQ.new_zeros(subspace.rank + 2, dtype=torch.float64)

    def update(self, x: Tensor, keep: Tensor | None) -> None:
        x_MK = x.flatten(0, -2) if keep is None else x[keep]
        wide_MK, lift = x_MK.float(), 1.0
        total = wide_MK.square().sum(1).sum(dtype=torch.float64)
        if x_MK.numel() and total < MIN_ENERGY:
            wide_MK, lift = lifted(x_MK)
            wide_MK = wide_MK.float()
            total = wide_MK.square().sum(1).sum(dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):
            along_MQ = wide_MK @ self.basis_KQ
        self.energy[:-2] += along_MQ.square().sum(0, dtype=torch.float64) / lift**2
        self.energy[-2] += total / lift**2
        self.energy[-1] += len(x_MK)

    def editability(self) -> list[float]:
        """The share of ‖X_f‖² left open at rank 0, 1, ... Q; never rising."""
        if is_distributed():
            self.energy = self.energy.to(communication_device(None))
            dist.all_reduce(self.energy)
        if not self.energy.isfinite().all():
            raise ValueError(f"forget activations of {self.name} have NaN or infinite entries.")
        if self.energy[-1] == 0:
            raise ValueError(f"forget set is empty: {self.name} has seen no activations from it.")
        if self.energy[-2] == 0:  # all its tokens are zero there: no subspace takes anything
            return [1.0] * (len(self.energy) - 1)
        taken = self.energy[:-2].cumsum(0) / self.energy[-2]
        return [1.0, *(1 - taken).clamp_(0, 1).tolist()]


def open_rank(shares: Sequence[float], min_editability: float) -> int:
    """The largest rank, at least 1, that leaves this editability; ``shares`` are by rank from 0."""
    return max(1, sum(share >= min_editability for share in shares) - 1)


def _truncate(
    whole: RetainSubspace,
    rank: int | None,
    energy: float | None,
    min_editability: float | None,
    shares: list[float] | None,
) -> RetainSubspace:
    if min_editability is None:
        return whole.truncate(rank, energy)
    assert shares is not None
    largest = open_rank(shares, min_editability)
    # All directions leave enough open: a wider sketch would have offered more of them.
    ran_out = largest == whole.rank < whole.in_features
    subspace = whole.truncate(largest)
    subspace.rank_limited = ran_out
    return subspace


def _agree(found: Agreed | None) -> Agreed:
    """The findings of the first rank that has batches; all ranks see the same model."""
    if is_distributed():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        found = next((theirs for theirs in everyone if theirs is not None), None)
    if found is None:
        raise ValueError("retain set is empty: batches yields nothing.")
    return found


def _check_request(
    linears: Mapping[str, nn.Module],
    width: int,
    rank: int | None,
    energy: float | None,
    min_editability: float | None,
    has_forget: bool,
) -> None:
    function = "estimate_retain_subspaces"
    check_range(f"{function}: width", width, "must be ≥ 1", whole=True)
    choices = {"rank": rank, "energy": energy, "min_editability": min_editability}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{function}: give exactly one of rank, energy, min_editability, got {given or 'none'}."
        )
    if rank is None:
        check_range(f"{function}: {given[0]}", choices[given[0]], "must be above 0 and at most 1")
        if min_editability is not None and not has_forget:
            raise ValueError(f"{function}: min_editability needs forget_batches to measure it on.")
    else:
        check_range(f"{function}: rank", rank, "must be 0 or more", whole=True)
        if rank > width:
            raise ValueError(
                f"{function}: rank={rank} needs a width of at least that, better {rank + 64}, got "
                f"width={width}."
            )
        for name, linear in linears.items():
            if rank > (k := linear_sizes(linear)[0]):
                raise ValueError(
                    f"{function}: rank={rank} is beyond the in_features={k} of "
                    f"{name}; lower it, exclude that layer, or choose by energy or min_editability."
                )


def _check_reached(sketches: Mapping[str, RetainSketch]) -> None:
    missed = [name for name, sketch in sketches.items() if sketch.tokens == 0]
    if len(missed) == len(sketches):
        raise ValueError(
            f"retain set is empty: no token reached {missed[0]} or any other layer. Either the "
            "masks leave none, or the model takes their forward or weights without calling them."
        )
    if missed:
        raise ValueError(
            f"no batch reached {len(missed)} of {len(sketches)} inputs, the first {missed[0]}; "
            f"leave these modules out of the targets, or add batches that use them."
        )


def _device_of(linear: nn.Module, default: torch.device) -> torch.device:
    # Offloaded weights stand on "meta" between calls.
    device, _ = place_of(linear)
    return default if device.type == "meta" else device
