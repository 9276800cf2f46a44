"""Projecting every adapter of a model as its layers do it once a step; see ``bench.py``."""

from __future__ import annotations

import functools

import torch

import nsru_kernels as nk
from nsru_bench.cases import assert_near, normal_numbers
from nsru_bench.internals import project_groups
from nsru_bench.session import Session

# (K, adapters on one basis) of a Llama-3-8B layer: q/k/v, o, gate/up, down.
LAYER = ((4096, 3), (4096, 1), (4096, 2), (14336, 1))
# Layers at a time: plans hold up to twice and down to half the measured number of adapters.
LAYERS = (32, 8, 2)
ONE = ((4096, 1),)  # what each linear's backward folds


def run(session: Session) -> None:
    rank, width = (4, 8) if session.tiny else (16, 256)
    layer, one = (((64, 3), (96, 1)), ((64, 1),)) if session.tiny else (LAYER, ONE)
    models = [layer * count for count in LAYERS]
    if session.on_cpu:
        models = models[1:]  # a CPU takes long to draw the bases of the whole model
    if session.tiny:
        models = [layer * 2]
    for inputs in (*models, one) if session.quick else (*models, one * 4, one):
        for basis_dtype in (torch.float32, torch.bfloat16):
            adapters = sum(count for _, count in inputs)
            if session.fits(f"fold {adapters} {basis_dtype}", 1 if session.tiny else 8):
                run_model(session, inputs, rank, width, basis_dtype)


def run_model(session: Session, inputs, rank, width, basis_dtype) -> None:
    normal = normal_numbers(session.device)
    groups = []
    for k, count in inputs:
        basis = torch.linalg.qr(normal(k, width))[0].contiguous().to(basis_dtype)
        groups.append(([normal(rank, k) for _ in range(count)], basis))
    calls = {}
    for backend in ("eager", "cpu", "triton"):
        if backend == "cpu" and basis_dtype != torch.float32:
            continue  # library GEMMs, as in eager
        name = "eager, a loop" if backend == "eager" else f"{backend}, one launch"
        try:
            folded = project_groups(groups, torch.float32, backend)
        except nk.BackendUnavailable as error:
            print(f"no {name}: {error}", flush=True)
            continue
        for (lora_as, basis), got in list(zip(groups, folded, strict=True))[
            :: max(1, len(groups) // 4)
        ]:
            exact = torch.cat([nk.project_adapter(a.double(), basis) for a in lora_as])
            assert_near(f"fold by {name}", got, exact, 1e-5)
        calls[name] = [functools.partial(project_groups, groups, session.dtype, backend)]
    adapters = [a for lora_as, _ in groups for a in lora_as]
    written = session.dtype.itemsize * sum(a.numel() for a in adapters)
    session.record(
        # By events, host included, as a step waits for it.
        "fold", session.time(calls, capture=False),
        {"adapters": len(adapters), "R": rank, "Q": width, "basis": str(basis_dtype)[6:]},
        flop=sum(4.0 * a.numel() * basis.shape[1] for lora_as, basis in groups for a in lora_as),
        moved=sum(b.nbytes for _, b in groups) + sum(a.nbytes for a in adapters) + written,
        base="eager, a loop",
    )  # fmt: skip
