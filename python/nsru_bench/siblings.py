"""Linears that read one x (q/k/v, gate/up) against everything a user could run; see ``bench.py``.

Every provider's y_i, dX, dA_i and dB_i are compared with float64 before anything is timed. "frozen"
computes y_i and dX only, and autograd sums its dX. "nsru" is the public op with the projection of
this optimizer step at hand, "single nsru" one such ``nsru_linear`` each; a backend's plan is timed
with the adapters projected beforehand.
"""

from __future__ import annotations

from nsru_bench import internals, providers
from nsru_bench.cases import Operands, Provider, sibling_shapes
from nsru_bench.linear import run_shape
from nsru_bench.session import Session


def run(session: Session) -> None:
    for shape in sibling_shapes(session):
        if session.fits(f"siblings {shape}", 2 if session.tiny else 30):
            run_shape(session, "siblings", shape, make_providers)


def make_providers(operands: Operands, session: Session) -> dict[str, Provider]:
    return {
        "frozen": providers.frozen(operands),
        "nsru": internals.projected_ops(operands, together=True),
        "single nsru": internals.projected_ops(operands, together=False),
        "peft bf16": providers.peft_linears(operands, fp32_adapters=False),
        **providers.plans(operands, together=True),
    }
