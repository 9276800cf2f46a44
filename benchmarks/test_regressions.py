"""The CPU paths that every user pays, for pytest-benchmark to compare between commits.

    pytest benchmarks --benchmark-enable --benchmark-autosave
    pytest benchmarks --benchmark-enable --benchmark-compare --benchmark-compare-fail=median:10%

Without --benchmark-enable each runs once, as a test. Compare on one quiet machine only.
"""

import pytest
import torch

import nsru_kernels as nk
from nsru_bench.linear_cpu import Case, frozen_linear, make_nsru, make_tensors
from nsru_bench.loss import make_inputs
from nsru_train.losses.nll import token_nll

CASE = Case(M=256, K=512, N=512, R=16, Q=64)


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(CASE)


@pytest.mark.parametrize("cached", [True, False], ids=["fold cached", "fold every call"])
def test_linear_forward_and_backward(benchmark, tensors, cached):
    provider = make_nsru(CASE, tensors, cached=cached)
    x = tensors.x.clone().requires_grad_()

    def step():
        provider.prepare()
        return torch.autograd.grad(provider.forward(x), (x, provider.lora_a), tensors.dy)

    dx, da = benchmark(step)
    assert dx.isfinite().all()
    assert (da @ tensors.basis).norm() <= 1e-2 * da.norm()


def test_siblings_forward_and_backward(benchmark, tensors):
    block = torch.nn.ModuleDict({name: frozen_linear(tensors) for name in "qkv"})
    subspaces = dict.fromkeys("qkv", tensors.basis)
    nk.swap_linears(block, "all-linear", rank=CASE.R, alpha=CASE.R, subspaces=subspaces)
    x = tensors.x.clone().requires_grad_()

    def step():
        ys = [block[name](x) for name in "qkv"]
        return torch.autograd.grad(ys, x, [tensors.dy] * 3)[0]

    step()  # who reads the same x is learnt from the first forward
    assert benchmark(step).isfinite().all()


def test_fold_of_a_model(benchmark, tensors):
    lora_as, bases = [tensors.lora_a] * 28, [tensors.basis] * 28
    folded = benchmark(nk.project_adapters, lora_as, bases)
    assert (folded[0] @ tensors.basis).norm() <= 1e-5 * tensors.lora_a.norm()


@pytest.mark.parametrize("width", [48, 192], ids=["nystrom", "covariance"])
def test_sketch_update(benchmark, tensors, width):
    sketch = nk.RetainSketch(CASE.K, width)
    benchmark(sketch.update, tensors.x)
    assert sketch.tokens % CASE.M == 0


def test_loss_forward_and_backward(benchmark):
    hidden, head, targets = make_inputs(256, 4096, 64, torch.bfloat16)

    def step():
        return torch.autograd.grad(token_nll(hidden, head, targets).sum(), hidden)[0]

    assert benchmark(step).isfinite().all()
