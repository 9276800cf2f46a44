"""The choice of a backend: the one named in the call, the one that was measured, or library GEMMs.

An op describes itself by an ``Op``; its backends are modules that export the same functions.
``auto`` takes a kernel only where a plan table holds a measurement for this device near these
sizes; everywhere else library GEMMs ("eager") serve. A backend named explicitly never falls back.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from nsru_kernels.dispatch import cpu_extension, extension, launch, plans
from nsru_kernels.dispatch.config import BACKENDS, BackendUnavailable

_logger = logging.getLogger("nsru_kernels")
_RECORDING = torch._C._TorchDispatchModeKey.PROXY  # make_fx


@dataclass(frozen=True, eq=False)
class Op:
    """An op's description of itself.

    Attributes:
        name: by which logs know it.
        callers: key in the plan tables → the public function whose calls it holds.
        load: backend → the module that serves under this name.
        dtypes: backend → the dtypes that its kernels take. A backend that is missing here has no
            kernels of its own and is served by library GEMMs.
        kernels: backend → what its kernels have been through.
        cuda_by_triton: Triton's kernels serve under the name "cuda" too, where both can run.
    """

    name: str
    callers: Mapping[str, str]
    load: Callable[[str], ModuleType]
    dtypes: Mapping[str, frozenset[torch.dtype]]
    kernels: Mapping[str, str]
    cuda_by_triton: bool = False

    def refuses(self, backend: str, dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
        """The first of ``dtypes`` that the backend's kernels do not take."""
        takes = self.dtypes.get(backend)
        return None if takes is None else next((d for d in dtypes if d not in takes), None)


class Query(NamedTuple):
    """Key of a call in the plan tables."""

    table: str
    function: str
    sizes: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


# Backends whose kernels take what stands at an address; the others ask tensors for their values.
READ_MEMORY = ("triton", "cuda")


class Choice(NamedTuple):
    """The module that serves, and the keyword arguments that carry its measured plan."""

    backend: str
    module: ModuleType
    options: dict[str, str]
    named: bool  # by the caller: then nothing may stand in for it


@functools.lru_cache(maxsize=4096)
def choose(
    op: Op,
    requested: str,
    device: torch.device,
    table: str,
    function: str,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    threads: int,
) -> Choice:
    """The module that serves a call.

    Args:
        requested: from ``requested_backend``.
        table, function, sizes, dtypes: as in ``Query``.
        threads: of PyTorch on the CPU, ``torch.get_num_threads()``.

    Raises:
        BackendUnavailable: the named backend cannot serve this op, here or in these dtypes.
    """
    if requested != "auto":
        reason = unavailable(op, requested, device) or wrong_dtype(op, requested, dtypes)
        if reason is not None:
            raise BackendUnavailable(
                f"backend={requested!r} cannot serve {op.callers[table]} on {device}: {reason}"
            )
        return Choice(requested, op.load(requested), {}, named=True)
    winner = measured(op, device, Query(table, function, sizes, dtypes), threads)
    if winner is None:
        _log_skipped(op, device)
        return Choice("eager", op.load("eager"), {}, named=False)
    module = op.load(winner.backend)
    # A plan's first word is its name; a module knows what of the rest it still has.
    served = winner.plan is not None and winner.plan.split()[0] in getattr(module, "PLANS", ())
    options = {"plan": winner.plan} if winner.plan is not None and served else {}
    return Choice(winner.backend, module, options, named=False)


def measured(op: Op, device: torch.device, query: Query, threads: int) -> plans.Winner | None:
    """The winner of a measurement near this call, if it can serve here; None for library GEMMs."""
    winner = plans.choose(query.table, query.function, device, query.sizes, threads)
    if winner is None or unavailable(op, winner.backend, device) is not None:
        return None
    return None if op.refuses(winner.backend, query.dtypes) else winner


def unavailable(op: Op, backend: str, device: torch.device) -> str | None:
    """Reason and remedy where a backend of ``op`` cannot run on ``device``; None where it can."""
    match backend:
        case "cpu":
            return cpu_extension.unavailable(device)
        case "triton":
            return launch.unavailable(device)
        case "cuda":
            reason = extension.unavailable(device)
            return launch.unavailable(device) if reason is None and op.cuda_by_triton else reason
    return None


def wrong_dtype(op: Op, backend: str, dtypes: Iterable[torch.dtype]) -> str | None:
    """Reason and remedy where the backend's kernels do not take ``dtypes``; else None."""
    refused = op.refuses(backend, dtypes)
    if refused is None:
        return None
    taken = ", ".join(sorted(str(d).removeprefix("torch.") for d in op.dtypes[backend]))
    return f"its kernels take {taken}, got {refused}. Use backend='eager'."


def by_library(op: Op, backend: str) -> bool:
    """True where library GEMMs serve under this name."""
    return backend not in op.dtypes


def unmeasured(op: Op, backend: str) -> str:
    """The reason why ``auto`` leaves a backend that could serve."""
    if by_library(op, backend):
        return "the same library GEMMs as 'eager'."
    limit, threads = plans.cpu_threads(), torch.get_num_threads()
    if backend == "cpu" and limit and threads > limit:
        return (
            f"measured with at most {limit} threads (now: {threads}); backend='cpu' uses it "
            f"anyway, torch.set_num_threads({limit}) lets auto use it."
        )
    return f"no measurement for this device near these sizes; backend={backend!r} uses it anyway."


def as_op(tensor: torch.Tensor) -> bool:
    """True where a registered op must stand in for the direct call: a graph is being recorded,
    or there is nothing to compute with."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return True
    return torch._C._get_dispatch_mode(_RECORDING) is not None


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _log_skipped(op: Op, device: torch.device) -> None:
    """Say once per op and device why no kernel serves."""
    for kernel in BACKENDS[:0:-1]:
        reason = unavailable(op, kernel, device) or unmeasured(op, kernel)
        _logger.info("%s: auto skips %s on %s: %s", op.name, kernel, device, reason)
