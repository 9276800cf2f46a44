"""The projection on CPUs with AMX: float32 against float64, no worse than eager."""

import functools

import pytest
import torch
from linear_cases import make_basis
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.ops.project import cpu

UNAVAILABLE = cpu_extension.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
by_cpu = functools.partial(nk.project_adapters, backend="cpu")


def check(lora_as, bases):
    eager = nk.project_adapters(lora_as, bases, backend="eager")
    exact = nk.project_adapters([a.double() for a in lora_as], bases, backend="eager")
    for name, *projected in zip(
        range(len(lora_as)), by_cpu(lora_as, bases), eager, exact, strict=True
    ):
        assert_close_to_exact(*projected, f"adapter {name}")


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    ("r", "k", "q"),
    [(1, 1, 1), (16, 2048, 256), (5, 70, 33), (9, 257, 17), (40, 300, 64), (3, 1000, 1)],
)
def test_agrees_with_float64(poisoned_memory, threads, count, r, k, q):
    basis = make_basis(k, q).float()
    threads(count)
    check([torch.randn(r, k)], [basis])


def test_many_adapters_and_bases_in_any_order(poisoned_memory):
    one, other = make_basis(300, 40).float(), make_basis(129, 7).float()
    bases = [one, one, other, None, one, other]
    lora_as = [torch.randn(r, 129 if u is other else 300) for r, u in enumerate(bases, start=3)]
    check(lora_as, bases)


def test_any_strides(poisoned_memory):
    basis = make_basis(60, 12).float()
    tidy = by_cpu([torch.arange(240.0).view(4, 60)], [basis])[0]
    columns = torch.arange(240.0).view(4, 60).T.contiguous().T
    wider = torch.zeros(60, 20)
    wider[:, 3:15] = basis
    for a, u in ((columns, basis), (columns, basis.T.contiguous().T), (columns, wider[:, 3:15])):
        assert torch.equal(by_cpu([a], [u])[0], tidy)
    assert torch.equal(by_cpu([torch._neg_view(-columns)], [basis])[0], tidy)


def test_no_adapter_rows_no_features_no_directions():
    assert by_cpu([torch.ones(0, 8)], [make_basis(8, 2).float()])[0].shape == (0, 8)
    assert cpu.project_many([torch.ones(2, 0)], [torch.ones(0, 3)], [None])[0].shape == (2, 0)
    a = torch.randn(3, 8)
    assert torch.equal(cpu.project_many([a], [torch.ones(8, 0)], [None])[0], a)


def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    a, basis = torch.randn(16, 3000), make_basis(3000, 100).float()
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(by_cpu([a], [basis])[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_other_dtypes_are_refused():
    a, basis = torch.randn(4, 64), make_basis(64, 8)
    for lora_a, u in ((a, basis.bfloat16()), (a.double(), basis), (a.bfloat16(), basis.float())):
        with pytest.raises(nk.BackendUnavailable, match="kernels take float32"):
            by_cpu([lora_a], [u])


def test_what_lies_around_the_operands_is_neither_read_nor_written():
    basis = torch.full((52, 30), torch.nan)
    basis[1:-1, 1:-1] = make_basis(50, 28).float()
    around = torch.full((2, 5, 50), torch.nan)
    a, projected = around[:, 1:-1]
    a.copy_(torch.randn(3, 50))
    take = cpu_extension.Arguments()
    adapters = [(a.data_ptr(), projected.data_ptr(), 3)]
    cpu_extension.load().project(take.matrix(basis[1:-1, 1:-1]), adapters, 2)
    assert projected.isfinite().all()
    assert around.isfinite().sum() == a.numel() + projected.numel()


def test_infinite_numbers_stay_in_their_rows():
    a, basis = torch.randn(12, 100), make_basis(100, 20).float()
    clean = by_cpu([a], [basis])[0]
    a[3, 5], a[9, 99] = torch.inf, torch.nan
    others = [row for row in range(12) if row not in (3, 9)]
    assert torch.equal(by_cpu([a], [basis])[0][others], clean[others])
