"""Explanations for ``explain`` and ``nsru env``: each backend of an op, why it serves or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from nsru_kernels.dispatch import plans
from nsru_kernels.dispatch.choice import (
    Op,
    Query,
    by_library,
    default_device,
    measured,
    unavailable,
    unmeasured,
    wrong_dtype,
)
from nsru_kernels.dispatch.config import BACKENDS, requested_backend
from nsru_kernels.ops.linear import backends as linear
from nsru_kernels.ops.project import backends as project
from nsru_kernels.ops.sketch import QUERY, SKETCH

# public function → its op, and what a call with these arguments is looked up by
OPS: dict[str, tuple[Op, Callable[[tuple], Query]]] = {
    "nsru_linear": (linear.LINEAR, linear.query_of_one),
    "nsru_linear_group": (linear.LINEAR, linear.query_of_group),
    "project_adapter": (project.PROJECT, project.query_of_call),
    "project_adapters": (project.PROJECT, project.query_of_call),
    "RetainSketch.update": (SKETCH, lambda args: QUERY),
}


class Verdict(NamedTuple):
    """One backend's standing for one op on one device."""

    op: str
    backend: str
    serves: bool
    reason: str
    kernels: str  # what the kernels have been through; empty where there are none


class Explanation(NamedTuple):
    """The findings of ``explain``; print it."""

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
    """Name the backend and plan that would serve a call, and say why not the others.

    Args:
        op: a public name: "nsru_linear", "nsru_linear_group", "project_adapter",
            "project_adapters" or "RetainSketch.update".
        args: the arguments of that call; their device decides. None: the default device.

    Raises:
        ValueError: unknown op.

    Examples:
        >>> explain("nsru_linear", torch.randn(2, 8)).backend
        'eager'
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}.")
    device = next((tensor.device for tensor in _tensors(args)), default_device())
    return Explanation(op, str(device), _verdicts(op, device, args, requested_backend("auto")))


def backend_status(chosen: str) -> list[Verdict]:
    """The verdict on every backend of every op on the default device, for ``nsru env``.

    ``chosen`` is what ``backend="auto"`` means.
    """
    return [v for op in OPS for v in _verdicts(op, default_device(), (), chosen)]


def _tensors(args: Iterable[object]) -> Iterable[torch.Tensor]:
    for arg in args:
        yield from (
            t for t in (arg if isinstance(arg, (list, tuple)) else [arg])
            if isinstance(t, torch.Tensor)
        )  # fmt: skip


def _verdicts(public: str, device: torch.device, args: tuple, chosen: str) -> list[Verdict]:
    op, query_of = OPS[public]
    query, plan, where = query_of(args), None, ""
    against_others = f"NSRU_BACKEND={chosen} is set."
    if chosen == "auto":
        chosen, against_others = "eager", ""
        winner = measured(op, device, query, torch.get_num_threads())
        if winner is not None:
            chosen, plan = winner
            other = plans.borrowed(query.table, query.function, device, query.sizes)
            where = f" on {other}, which has the same chip" if other else ""
            against_others = f"{chosen} measured faster near these sizes{where}."
    verdicts = []
    for backend in reversed(BACKENDS):
        reason = unavailable(op, backend, device) or wrong_dtype(op, backend, query.dtypes)
        serves = reason is None and backend == chosen
        if serves:
            reason = f"measured plan {plan}{where}" if plan else f"measured or asked for{where}"
            if by_library(op, backend):
                reason = "library GEMMs of PyTorch" + (f", {reason}" if plan else "")
        reason = reason or against_others or unmeasured(op, backend)
        verdicts.append(Verdict(public, backend, serves, reason, op.kernels.get(backend, "")))
    return verdicts
