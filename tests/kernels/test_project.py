"""project_adapter(s): definition, leakage gates, rounded and weighted bases, gradients."""

import pytest
import torch
from linear_cases import make_basis
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels.ops.project import autograd, gram
from nsru_kernels.ops.project.reference import gram_inverse

K_LARGE = 4096


def leakage(projected, basis, adapter):
    return ((projected.double() @ basis.double()).norm() / adapter.double().norm()).item()


def by_definition(adapter, projector_factor):
    """A (I - F Fᵀ) in float64."""
    a, f = adapter.double(), projector_factor.double()
    return a - (a @ f) @ f.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_definition(dtype):
    a = torch.randn(5, 40).to(dtype)
    basis = make_basis(40, 8).to(torch.float64 if dtype == torch.float64 else torch.float32)
    eager = (a.to(basis.dtype) - (a.to(basis.dtype) @ basis) @ basis.T).to(dtype)
    projected = nk.project_adapter(a, basis)
    assert_close_to_exact(projected, eager, by_definition(a, basis))
    assert projected.is_contiguous()


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_leakage_gates(basis_dtype):
    """≤ 1e-6 in fp32 and ≤ 5e-4 rounded to bf16 at K = 4096, for rounded bases too."""
    torch.manual_seed(0)
    a = torch.randn(16, K_LARGE)
    basis = torch.linalg.qr(torch.randn(K_LARGE, 256)).Q.to(basis_dtype)
    projected = nk.project_adapter(a, basis)
    assert leakage(projected, basis, a) <= 1e-6
    assert leakage(projected.bfloat16(), basis, a) <= 5e-4


def test_a_rounded_basis_without_its_correction_would_miss_the_gate():
    torch.manual_seed(0)
    a = torch.randn(16, K_LARGE)
    basis = torch.linalg.qr(torch.randn(K_LARGE, 64)).Q.bfloat16()
    assert leakage(by_definition(a, basis), basis, a) > 1e-5


def test_weighted_basis_is_a_soft_projector():
    u, weights = make_basis(40, 8), torch.linspace(0, 1, 8, dtype=torch.float64)
    soft = u * weights.sqrt()
    a = torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(nk.project_adapter(a, soft), a - (a @ u * weights) @ u.T)


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_a_weighted_basis_keeps_its_weights(basis_dtype):
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(1024, 16, dtype=torch.float64)).Q
    weights = torch.linspace(0, 0.9, 16, dtype=torch.float64)
    soft = (u * weights.sqrt()).to(basis_dtype)
    a = torch.randn(4, 1024, dtype=torch.float64)
    got = nk.project_adapter(a, soft) @ u
    torch.testing.assert_close(got, a @ u * (1 - weights), rtol=0, atol=2e-2)
    unweighted = a @ u
    assert (got - unweighted).abs().max() > 0.5, "the projector does something"


def test_gram_core_of_degenerate_bases():
    """Zero columns and repeated columns: still the projector on what the columns span."""
    u = make_basis(32, 4)
    degenerate = torch.cat([u, torch.zeros(32, 1), u[:, :1]], dim=1)
    a = torch.randn(3, 32)
    got = nk.project_adapter(a, degenerate.bfloat16())
    assert leakage(got, degenerate.bfloat16(), a) < 1e-5
    assert torch.isfinite(gram_inverse(degenerate.bfloat16())).all()


def test_project_adapters_equals_one_by_one_in_any_mix():
    shared = make_basis(24, 5).float()
    adapters = [torch.randn(r, k) for r, k in ((2, 24), (7, 24), (3, 10), (1, 6))]
    adapters[2] = adapters[2].bfloat16()
    bases = [shared, shared, make_basis(10, 2).bfloat16(), None]
    projected = nk.project_adapters(adapters, bases)
    for got, a, basis in zip(projected, adapters, bases, strict=True):
        assert got.dtype == a.dtype
        # Not bit by bit: a GEMM of more rows rounds differently on some CPUs.
        torch.testing.assert_close(got, nk.project_adapter(a, basis))
    assert nk.project_adapters([], []) == []


def test_empty_basis_projects_nothing():
    a = torch.randn(3, 8)
    assert torch.equal(nk.project_adapter(a, torch.empty(8, 0)), a)
    assert torch.equal(nk.project_adapter(a, torch.empty(8, 0).bfloat16()), a)


def test_autocast_does_not_touch_the_projection():
    a, basis = torch.randn(4, 64), make_basis(64, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = nk.project_adapter(a, basis)
    assert torch.equal(projected, nk.project_adapter(a, basis))


def test_gradcheck_and_subsets():
    bases = [make_basis(9, 3), make_basis(7, 2)]
    leaves = [torch.randn(2, k, dtype=torch.float64, requires_grad=True) for k in (9, 7)]
    assert torch.autograd.gradcheck(lambda *a: tuple(nk.project_adapters(a, bases)), leaves)
    leaves[0].requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda a: nk.project_adapters([leaves[0], a], bases)[1], leaves[1]
    )


def test_what_gets_no_gradient_is_not_projected(monkeypatch):
    leaves = [torch.randn(2, 9, requires_grad=True) for _ in range(3)]
    _, used, _ = nk.project_adapters(leaves, [make_basis(9, 3).float()] * 3)
    taken = []
    many = autograd.project_many

    def counted(as_RK, *args):
        taken.append(len(as_RK))
        return many(as_RK, *args)

    monkeypatch.setattr(autograd, "project_many", counted)
    used.sum().backward()
    assert taken == [1]
    assert [a.grad is None for a in leaves] == [True, False, True]


def test_the_gradient_stays_in_the_null_space_for_a_rounded_basis():
    a, basis = torch.randn(4, 256, requires_grad=True), make_basis(256, 16).bfloat16()
    (grad,) = torch.autograd.grad(nk.project_adapter(a, basis).square().sum(), a)
    assert leakage(grad, basis, grad) < 1e-6


def test_correction_is_computed_once_and_again_after_an_edit(monkeypatch):
    calls = []
    monkeypatch.setattr(gram, "gram_inverse", lambda basis: calls.append(1) or gram_inverse(basis))
    a, basis = torch.randn(4, 32), make_basis(32, 4).bfloat16()
    for _ in range(3):
        nk.project_adapters([a, a.bfloat16()], [basis, basis])
    assert len(calls) == 1
    basis.copy_(make_basis(32, 4, seed=5))
    assert leakage(nk.project_adapter(a, basis), basis, a) < 1e-6
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("adapter", "basis", "message"),
    [
        (torch.ones(3), None, r"lora_a must be a floating \[R, K\] matrix, got \(3,\)"),
        (torch.ones(3, 4).int(), None, "lora_a must be a floating.*int32"),
        (torch.ones(3, 4), torch.ones(5, 2), r"\[K=4, Q\].*got \(5, 2\).*another layer"),
        (torch.ones(3, 4), torch.ones(4, 5), r"Q ≤ K, got \(4, 5\). Is it transposed"),
        (torch.ones(3, 4), torch.ones(4, 2).bool(), "basis must be a floating.*bool"),
        (torch.ones(3, 4), torch.ones(4, 2, requires_grad=True), r"pass basis\.detach\(\)"),
        (torch.ones(3, 4), torch.ones(4, 2, device="meta"), "basis is on meta, lora_a on cpu"),
    ],
)
def test_bad_input(adapter, basis, message):
    with pytest.raises(ValueError, match=message):
        nk.project_adapter(adapter, basis)


def test_lists_of_different_length():
    with pytest.raises(ValueError, match=r"one entry per adapter \(2\), got 1"):
        nk.project_adapters([torch.ones(1, 2)] * 2, [None])
