"""Folding every adapter of a model: one launch against a loop; see ``bench.py``."""

from __future__ import annotations

import functools

import torch

import nsru_kernels as nk
from nsru_bench.cases import assert_near, normal_numbers
from nsru_bench.session import Session

# (K, adapters on one basis) of a Llama-3-8B layer: q/k/v, o, gate/up, down.
LAYER = ((4096, 3), (4096, 1), (4096, 2), (14336, 1))
# Layers at a time: plans hold up to twice and down to half the measured number of adapters.
LAYERS = (32, 8, 2)
ONE = ((4096, 1),)  # what each linear's backward folds


def run(session: Session) -> None:
    rank, width = (4, 8) if session.tiny else (16, 256)
    layer, one = (((64, 3), (96, 1)), ((64, 1),)) if session.tiny else (LAYER, ONE)
    models = [layer * count for count in (LAYERS[:1] if session.quick else LAYERS)]
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
    lora_as, bases = [], []
    for k, count in inputs:
        basis = torch.linalg.qr(normal(k, width))[0].contiguous().to(basis_dtype)
        lora_as += [normal(rank, k) for _ in range(count)]
        bases += [basis] * count
    pairs = list(zip(lora_as, bases, strict=True))
    calls = {"eager, a loop": [lambda: nk.project_adapters(lora_as, bases, backend="eager")]}
    for backend in ("cpu", "triton", "cuda"):
        if backend == "cpu" and basis_dtype != torch.float32:
            continue  # library GEMMs, as in eager
        try:
            nk.project_adapters(lora_as[:1], bases[:1], backend=backend)
        except nk.BackendUnavailable as error:
            print(f"no grouped launch: {error}", flush=True)
            continue
        fold = functools.partial(nk.project_adapters, lora_as, bases, backend=backend)
        each = [functools.partial(nk.project_adapter, a, u, backend=backend) for a, u in pairs]
        calls[f"{backend}, one launch"] = [fold]
        calls[f"{backend}, a launch each"] = [lambda each=each: [one() for one in each]]
    for name, call in calls.items():
        for (a, u), folded in list(zip(pairs, call[0](), strict=True))[:: max(1, len(pairs) // 8)]:
            assert_near(f"fold by {name}", folded, nk.project_adapter(a.double(), u), 1e-5)
    distinct = {u.data_ptr(): u for u in bases}.values()
    session.record(
        # By events, host included, as a step waits for it: a graph would write the table anew.
        "fold", session.time(calls, capture=False),
        {"adapters": len(lora_as), "R": rank, "Q": width, "basis": str(basis_dtype)[6:]},
        flop=sum(4.0 * a.numel() * u.shape[1] for a, u in pairs),
        moved=sum(u.nbytes for u in distinct) + 2 * sum(a.nbytes for a in lora_as),
        base="eager, a loop",
    )  # fmt: skip
