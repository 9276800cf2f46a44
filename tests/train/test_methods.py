"""Suppressions: formulas in fp64, limits, and the direction in which they push."""

import math

import pytest
import torch

from nsru_train.methods import SUPPRESSIONS, suppress, unlikelihood

NLL = torch.tensor([0.0, 1e-4, 0.3, 12.0, 400.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 4, 7, 20, 40])
REFERENCE = torch.tensor([0.0, 0.5, 0.1, 3.0, 5.0], dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


FORMULAS = {
    "npo": lambda nll, n, ref, beta, delta: -2 / beta * log_sigmoid(beta * (nll - ref)),
    "simnpo": lambda nll, n, ref, beta, delta: -2 / beta * log_sigmoid(beta * (nll / n - delta)),
    "unlikelihood": lambda nll, n, ref, beta, delta: -math.log(1 - math.exp(-(nll / n + 1e-3))),
    "gradient_ascent": lambda nll, n, ref, beta, delta: -nll,
}


@pytest.mark.parametrize("name", SUPPRESSIONS)
@pytest.mark.parametrize(("beta", "delta"), [(0.1, 0.0), (4.5, 0.7)])
def test_formula(name, beta, delta):
    loss = suppress(name, NLL, LENGTHS, REFERENCE, beta=beta, delta=delta)
    expected = [
        FORMULAS[name](*row, beta, delta)
        for row in zip(NLL.tolist(), LENGTHS.tolist(), REFERENCE.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pushes_nll_up_with_finite_gradients(name, dtype):
    nll = NLL.to(dtype).requires_grad_()
    suppress(name, nll, LENGTHS, REFERENCE.to(dtype)).sum().backward()
    assert torch.isfinite(nll.grad).all()
    assert (nll.grad <= 0).all()
    assert (nll.grad[:3] < 0).all(), "a known answer must always be pushed"


def test_default_betas():
    for name, beta in (("npo", 0.1), ("simnpo", 4.5)):
        torch.testing.assert_close(
            suppress(name, NLL, LENGTHS, REFERENCE),
            suppress(name, NLL, LENGTHS, REFERENCE, beta=beta),
        )


def test_npo_starts_as_gradient_ascent_and_fades():
    nll = torch.tensor([3.0, 103.0], requires_grad=True)
    suppress("npo", nll, torch.ones(2), torch.tensor([3.0, 3.0])).sum().backward()
    assert nll.grad[0] == pytest.approx(-1.0)
    assert -1e-4 < nll.grad[1] < 0


def test_unlikelihood_is_bounded():
    loss = unlikelihood(torch.tensor([0.0, 1e4]), torch.tensor([5, 5]))
    assert loss[0] == pytest.approx(6.908, abs=1e-3)
    assert loss[1] == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"npo, simnpo, unlikelihood.*got 'dpo'"):
        suppress("dpo", NLL, LENGTHS, REFERENCE)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        suppress("npo", NLL, LENGTHS, REFERENCE, beta=0)
