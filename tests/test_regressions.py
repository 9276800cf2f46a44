"""The CPU paths that every user pays, for pytest-benchmark to compare between commits.

    pytest tests/test_regressions.py --benchmark-enable --benchmark-autosave
    pytest tests/test_regressions.py --benchmark-enable \\
        --benchmark-compare --benchmark-compare-fail=median:10%

Without --benchmark-enable each runs once, as a test. Compare on one quiet machine only.
"""

import pytest
import torch

import nsru_kernels as nk
from nsru_bench import providers
from nsru_bench.cases import Shape, make_operands
from nsru_bench.linear import calls
from nsru_bench.loss import make_inputs
from nsru_train.losses.nll import token_nll

SHAPE = Shape(256, 512, (512,), 16, 64)
QKV = SHAPE._replace(widths=(512, 512, 512))


@pytest.fixture(scope="module")
def operands():
    return make_operands(SHAPE, torch.bfloat16)


@pytest.mark.parametrize("cached", [True, False], ids=["fold cached", "fold every call"])
@pytest.mark.parametrize("shape", [SHAPE, QKV], ids=["linear", "siblings"])
def test_forward_and_backward(benchmark, shape, cached):
    operands = make_operands(shape, torch.bfloat16)
    provider = providers.modules(operands, cached=cached)
    step = calls(operands, provider, "forward+backward", 1)[0]
    dx, *grads = benchmark(step)
    assert dx.isfinite().all()
    for da in grads[: len(shape.widths)]:
        assert (da @ operands.basis).norm() <= 1e-2 * da.norm()


def test_fold_of_a_model(benchmark, operands):
    lora_as, basis = operands.lora_as * 28, operands.basis
    projected = benchmark(nk.project_adapters, lora_as, [basis] * 28)
    assert (projected[0] @ basis).norm() <= 1e-5 * lora_as[0].norm()


@pytest.mark.parametrize("width", [48, 192], ids=["nystrom", "covariance"])
def test_sketch_update(benchmark, operands, width):
    sketch = nk.RetainSketch(SHAPE.K, width)
    benchmark(sketch.update, operands.x)
    assert sketch.tokens % SHAPE.M == 0


def test_loss_forward_and_backward(benchmark):
    hidden, head, targets = make_inputs(256, 4096, 64, torch.bfloat16)

    def step():
        return torch.autograd.grad(token_nll(hidden, head, targets).sum(), hidden)[0]

    assert benchmark(step).isfinite().all()
