"""Which backend serves an op on a device, and why the others do not.

A backend of an op is a module in the op's folder: ``reference.py`` is "eager", ``triton.py`` is
"triton", ``cuda.py`` is "cuda"; all of them export the same functions. A kernel module also exports

    plan(*args) -> str | None    the measured plan in plans/ for these arguments; None without one

and is imported only where ``_UNAVAILABLE`` finds nothing against it.

``auto`` takes a kernel only where it has a measured plan; everywhere else library GEMMs serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from nsru_kernels.config import BACKENDS, BackendUnavailable, requested_backend
from nsru_kernels.ops import launch

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
KERNELS = {
    ("linear", "triton"): NOT_RUN,
    ("linear_group", "triton"): NOT_RUN,
    ("fold", "triton"): NOT_RUN,
    ("sketch", "triton"): NOT_RUN,
}

_MODULE = {"eager": "reference", "triton": "triton", "cuda": "cuda"}
# backend → device → why it cannot run there and what to do, None where it can
_UNAVAILABLE: dict[str, Callable[[torch.device], str | None]] = {"triton": launch.unavailable}
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
    """The module that serves the op in folder ``op`` on ``device``; a named one never falls back.

    Raises:
        ValueError: unknown backend name.
        BackendUnavailable: the named backend cannot serve this op on this device.
    """
    return _implementation(op, requested_backend(backend), device)


def run(op: str, function: str, backend: str, device: torch.device, *args: Any) -> Any:
    """Call ``function`` of the module that serves ``op``, with autocast off: ops choose dtypes."""
    call = getattr(implementation(op, backend, device), function)
    if not torch.is_autocast_enabled(device.type):
        return call(*args)
    with torch.autocast(device.type, enabled=False):
        return call(*args)


def backend_status(device: torch.device | None = None) -> list[Verdict]:
    """The verdict on every backend of every op, for ``nsru env``."""
    return [v for op in OPS for v in _verdicts(op, device or default_device(), ())]


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _implementation(op: str, backend: str, device: torch.device) -> ModuleType:
    if backend == "auto":
        for kernel in ("cuda", "triton"):
            reason = _unavailable(op, kernel, device) or _unmeasured(op, kernel, ())
            if reason is None:
                return _load(op, kernel)
            _logger.info("%s: auto skips %s on %s: %s", op, kernel, device, reason)
        return _load(op, "eager")
    reason = _unavailable(op, backend, device)
    if reason is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot serve {op} on {device}: {reason}")
    return _load(op, backend)


def _verdicts(op: str, device: torch.device, args: tuple) -> list[Verdict]:
    folder, requested = OPS[op], requested_backend("auto")
    verdicts: list[Verdict] = []
    for backend in reversed(BACKENDS):
        reason = _unavailable(folder, backend, device)
        if reason is None and requested not in ("auto", backend):
            reason = f"NSRU_BACKEND={requested} is set."
        if reason is None and backend != "eager" and requested == "auto":
            reason = _unmeasured(folder, backend, args)
        if reason is None and any(verdict.serves for verdict in verdicts):
            reason = "a kernel that measured faster serves."
        serves = reason is None
        if serves:
            reason = "library GEMMs of PyTorch" if backend == "eager" else "measured plan"
        kernels = KERNELS.get((folder, backend), "")
        verdicts.append(Verdict(op, backend, serves, reason or "", kernels))
    return verdicts


def _unavailable(op: str, backend: str, device: torch.device) -> str | None:
    if backend == "eager":
        return None
    if importlib.util.find_spec(f"nsru_kernels.ops.{op}.{_MODULE[backend]}") is None:
        return f"this version has no {backend} kernel for this op. Use backend='eager'."
    return _UNAVAILABLE[backend](device)


def _unmeasured(op: str, backend: str, args: tuple) -> str | None:
    if _load(op, backend).plan(*args) is None:
        return f"no measurement for this GPU in plans/; backend={backend!r} uses it all the same."
    return None


def _load(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"nsru_kernels.ops.{op}.{_MODULE[backend]}")
