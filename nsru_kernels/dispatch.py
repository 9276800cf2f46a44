"""Which backend serves an op on a device, and why the others do not.

A backend of an op is a module in the op's folder: ``reference.py`` is "eager", the others are named
like their backends; all of them export the same functions. An op for which "cpu" has no kernels of
its own (``_LIBRARY_ON_CPU``) is served by ``reference.py`` under that name too. A kernel module is
imported only where ``_UNAVAILABLE`` finds nothing against it.

``auto`` takes a kernel only where it has a measured plan; everywhere else library GEMMs serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from nsru_kernels import plans
from nsru_kernels.config import BACKENDS, BackendUnavailable, requested_backend
from nsru_kernels.ops import cpu_extension, extension, launch

# public function → folder in nsru_kernels/ops
OPS = {
    "nsru_linear": "linear",
    "nsru_linear_group": "linear_group",
    "project_adapter": "fold",
    "project_adapters": "fold",
    "RetainSketch.update": "sketch",
}

# (folder, backend) → what its kernels have been through. README's table says the same.
NOT_RUN = "compiled for sm_80, sm_90 and sm_100 and interpreted, not run on a GPU"
WITH_GEMM = "compiled for sm_90a, all but the GEMM emulated, not run on a GPU"
EMULATED = "compiled for sm_80 and sm_90a and emulated, not run on a GPU"
ON_CPU = "run on one kind of Intel Xeon with AMX, up to two threads"
KERNELS = {
    ("linear", "cpu"): ON_CPU,
    ("linear_group", "cpu"): ON_CPU,
    ("fold", "cpu"): ON_CPU,
    ("linear", "cuda"): WITH_GEMM,
    ("linear", "triton"): NOT_RUN,
    ("linear_group", "triton"): NOT_RUN,
    ("linear_group", "cuda"): WITH_GEMM,
    ("fold", "triton"): NOT_RUN,
    ("fold", "cuda"): EMULATED,
    ("sketch", "triton"): NOT_RUN,
    ("sketch", "cuda"): EMULATED,
}

# Ops of which "cpu" has no kernels of its own.
_LIBRARY_ON_CPU = ("sketch",)
# backend → (folder, device) → why it cannot run there and what to do, None where it can
_UNAVAILABLE: dict[str, Callable[[str, torch.device], str | None]] = {
    "cpu": cpu_extension.unavailable,
    "cuda": extension.unavailable,
    "triton": lambda op, device: launch.unavailable(device),
}
_RECORDING = torch._C._TorchDispatchModeKey.PROXY  # make_fx
_CPU_DTYPES = {"fold": frozenset((torch.float32,))}  # elsewhere those of the extension
_logger = logging.getLogger("nsru_kernels")


class Verdict(NamedTuple):
    """One backend's standing for one op on one device."""

    op: str
    backend: str
    serves: bool
    reason: str
    kernels: str  # what the kernels have been through; empty where there are none


class Explanation(NamedTuple):
    """What ``explain`` found; print it."""

    op: str
    device: str
    verdicts: list[Verdict]

    @property
    def backend(self) -> str | None:
        """The backend that serves; None where the one in NSRU_BACKEND cannot and a call raises."""
        return next((verdict.backend for verdict in self.verdicts if verdict.serves), None)

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.backend or 'no backend, a call raises'}"]
        for verdict in self.verdicts:
            mark = "serves" if verdict.serves else "no"
            lines.append(f"  {verdict.backend:<7}{mark:<8}{verdict.reason}")
            if verdict.kernels:
                lines.append(f"  {'':<15}kernels: {verdict.kernels}")
        return "\n".join(lines)


def explain(op: str, *args: object) -> Explanation:
    """Which backend and plan would serve a call, and why not the others.

    Args:
        op: a public name: "nsru_linear", "nsru_linear_group", "project_adapter",
            "project_adapters" or "RetainSketch.update".
        args: the arguments of that call; their device decides. None: the default device.
    Raises:
        ValueError: unknown op.

    >>> explain("nsru_linear", torch.randn(2, 8)).backend
    'eager'
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}.")
    tensors = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
    device = next((t.device for t in tensors if isinstance(t, torch.Tensor)), default_device())
    return Explanation(op, str(device), _verdicts(op, device, args))


def implementation(op: str, backend: str, device: torch.device) -> ModuleType:
    """The module behind a backend's name; ``auto`` as far as it does not depend on sizes.

    Raises:
        ValueError: unknown backend name.
        BackendUnavailable: the named backend cannot serve this op on this device.
    """
    return _choose(op, "", requested_backend(backend), device)[0]


def run(
    op: str,
    function: str,
    backend: str,
    device: torch.device,
    *args: Any,
    sizes: tuple[int, ...] = (),
    dtypes: tuple[torch.dtype, ...] = (),
    chosen_by: str | None = None,
) -> Any:
    """Call ``function`` of the module that serves ``op``, with autocast off: ops choose dtypes.

    Args:
        op: folder in nsru_kernels/ops.
        function: name in its modules.
        backend: as the caller of the public function gave it; a named one never falls back.
        device: of the operands.
        args: handed over.
        sizes: what measured plans are looked up by.
        dtypes: of the operands; ``auto`` leaves those that kernels do not take to eager.
        chosen_by: another function of the op whose choice this one has to share.
    """
    requested, threads = requested_backend(backend), torch.get_num_threads()
    module, plan = _choose(op, chosen_by or function, requested, device, sizes, dtypes, threads)
    call = getattr(module, function)
    if plan in getattr(module, "PLANS", ()) and not chosen_by:
        call = functools.partial(call, plan=plan)
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _call(op, function, requested, call, args)
    return _call(op, function, requested, call, args)


def _call(op: str, function: str, requested: str, call: Callable[..., Any], args: tuple) -> Any:
    try:
        return call(*args)
    except BackendUnavailable:  # measured at these sizes, but not for this layout, say
        if requested != "auto":
            raise
        return getattr(_load(op, "eager"), function)(*args)


def as_op(tensor: torch.Tensor) -> bool:
    """Whether a registered op must stand in for the direct call: there is a graph to be recorded,
    or nothing to compute with."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return True
    return torch._C._get_dispatch_mode(_RECORDING) is not None


def backend_status(device: torch.device | None = None) -> list[Verdict]:
    """The verdict on every backend of every op, for ``nsru env``."""
    return [v for op in OPS for v in _verdicts(op, device or default_device(), ())]


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=4096)
def _choose(
    op: str,
    function: str,
    requested: str,
    device: torch.device,
    sizes: tuple[int, ...] = (),
    dtypes: tuple[torch.dtype, ...] = (),
    threads: int = 0,
) -> tuple[ModuleType, str | None]:
    """The module and the plan for calls that are alike in all of this."""
    if requested != "auto":
        return _named(op, requested, device), None
    choice = plans.choose(op, function, device, sizes, threads)
    if choice is None:
        _log_skipped(op, device)
        return _load(op, "eager"), None
    if not _takes(op, choice.backend, dtypes):
        return _load(op, "eager"), None
    try:
        return _named(op, choice.backend, device), choice.plan
    except BackendUnavailable:
        _log_skipped(op, device)
        return _load(op, "eager"), None


def _named(op: str, backend: str, device: torch.device) -> ModuleType:
    reason = _unavailable(op, backend, device)
    if reason is not None:
        name = next(name for name, folder in OPS.items() if folder == op)
        raise BackendUnavailable(f"backend={backend!r} cannot serve {name} on {device}: {reason}")
    return _load(op, backend)


@functools.cache
def _log_skipped(op: str, device: torch.device) -> None:
    """Say once per op and device why no kernel serves."""
    for kernel in BACKENDS[:0:-1]:
        reason = _unavailable(op, kernel, device) or _unmeasured(op, kernel)
        _logger.info("%s: auto skips %s on %s: %s", op, kernel, device, reason)


def _verdicts(op: str, device: torch.device, args: tuple) -> list[Verdict]:
    folder, chosen, plan = OPS[op], requested_backend("auto"), None
    against_others = f"NSRU_BACKEND={chosen} is set."
    dtypes = _dtypes(folder, args)
    if chosen == "auto":
        function, sizes = _looked_up_by(op, args)
        choice = plans.choose(folder, function, device, sizes, torch.get_num_threads())
        if (
            choice is None
            or _unavailable(folder, choice.backend, device) is not None
            or not _takes(folder, choice.backend, dtypes)
        ):
            chosen, against_others = "eager", ""
        else:
            chosen, plan = choice
            against_others = f"{chosen} measured faster near these sizes."
    verdicts: list[Verdict] = []
    for backend in reversed(BACKENDS):
        reason = _unavailable(folder, backend, device)
        if reason is None and not _takes(folder, backend, dtypes):
            reason = f"its kernels do not take {next(iter(dtypes))}. Use backend='eager'."
        if reason is None and backend != chosen:
            reason = against_others or _unmeasured(folder, backend)
        serves = reason is None
        if serves:
            reason = f"measured plan {plan}" if plan else "measured or asked for"
            if _by_library(folder, backend):
                reason = "library GEMMs of PyTorch"
        kernels = KERNELS.get((folder, backend), "")
        verdicts.append(Verdict(op, backend, serves, reason or "", kernels))
    return verdicts


def _dtypes(folder: str, args: tuple) -> set[torch.dtype]:
    """What ``auto`` asks of a backend that it takes: the dtype of a linear's x, those of a fold."""
    if "linear" in folder:
        return {_compute_dtype(x) for x in args[:1] if isinstance(x, torch.Tensor)}
    if folder == "fold":
        tensors = [
            t for arg in args[:2] for t in (arg if isinstance(arg, (list, tuple)) else [arg])
        ]
        return {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    return set()


def _looked_up_by(op: str, args: tuple) -> tuple[str, tuple[int, ...]]:
    """The function and sizes by which a call of the public ``op`` finds its measured plan."""
    if op == "nsru_linear":
        shapes = [tuple(a.shape) for a in args[:3] if isinstance(a, torch.Tensor)]
        if len(shapes) == 3 and all(shapes):
            x, weight, lora_a = shapes
            return "forward", (math.prod(x[:-1]), x[-1], weight[0], lora_a[0])
        return "forward", ()
    if op == "nsru_linear_group" and len(args) > 2:
        x, weights, lora_as = args[:3]
        if isinstance(x, torch.Tensor) and x.dim() and isinstance(weights, (list, tuple)):
            n, r = (sum(t.shape[0] for t in tensors) for tensors in (weights, lora_as))
            return "forward", (math.prod(x.shape[:-1]), x.shape[-1], n, r)
    if op == "RetainSketch.update" and len(args) > 1:
        sketch, x = args[:2]
        if isinstance(x, torch.Tensor) and x.dim() and hasattr(sketch, "width"):
            return "update_sketch", (math.prod(x.shape[:-1]), x.shape[-1], sketch.width)
    if OPS[op] == "fold" and len(args) > 1:
        bases = args[1] if isinstance(args[1], (list, tuple)) else args[1:2]
        return "fold_many", (sum(basis is not None for basis in bases),)
    return {"fold": "fold_many", "sketch": "update_sketch"}.get(OPS[op], "forward"), ()


def _unavailable(op: str, backend: str, device: torch.device) -> str | None:
    if backend == "eager":
        return None
    if importlib.util.find_spec(_module_name(op, backend)) is None:
        return f"this version has no {backend} kernel for this op. Use backend='eager'."
    return _UNAVAILABLE[backend](op, device)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    from nsru_kernels.ops.linear import compute_dtype  # which imports this module

    return compute_dtype(x)


def _takes(op: str, backend: str, dtypes: Iterable[torch.dtype]) -> bool:
    takes = launch.KERNEL_DTYPES
    if backend == "cpu":
        takes = _CPU_DTYPES.get(op, cpu_extension.KERNEL_DTYPES)
    return backend == "eager" or takes.issuperset(dtypes)


def _unmeasured(op: str, backend: str) -> str:
    """Why ``auto`` leaves a backend that could serve."""
    if _by_library(op, backend):
        return "the same library GEMMs as 'eager'."
    limit, threads = plans.cpu_threads(), torch.get_num_threads()
    if backend == "cpu" and limit and threads > limit:
        return (
            f"measured with at most {limit} threads (now: {threads}); backend='cpu' uses it "
            f"anyway, torch.set_num_threads({limit}) lets auto use it."
        )
    return f"no measurement for this device near these sizes; backend={backend!r} uses it anyway."


def _load(op: str, backend: str) -> ModuleType:
    return importlib.import_module(_module_name(op, backend))


def _module_name(op: str, backend: str) -> str:
    return f"nsru_kernels.ops.{op}.{'reference' if _by_library(op, backend) else backend}"


def _by_library(op: str, backend: str) -> bool:
    return backend == "eager" or (backend == "cpu" and op in _LIBRARY_ON_CPU)
