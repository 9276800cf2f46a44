"""Grouped products, by PyTorch's grouped GEMM and by one GEMM a group, against float64."""

import pytest
import torch
import torch.nn.functional as F

from nsru_kernels.ops import grouped
from nsru_kernels.ops.grouped import Groups
from tests.tolerance import assert_close_to_exact

E, K, N = 5, 24, 16
SIZES = [3, 0, 6, 1, 0]  # an empty group between others, and one at the end
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def make_groups(sizes=SIZES):
    return Groups(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), E)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


@pytest.fixture(params=["grouped_mm", "loop"], autouse=True)
def way(request, monkeypatch):
    if request.param == "loop":
        monkeypatch.setattr(grouped, "_taken", lambda *_: False)
    elif not hasattr(F, "grouped_mm"):
        pytest.skip("torch has grouped_mm from 2.10 on")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [N, 8, 3])
def test_matmul(dtype, transposed, n):
    x, w = random(10, K, dtype=dtype), random(E, n, K, dtype=dtype)
    w = w.mT if transposed else w.mT.contiguous()
    owner = torch.repeat_interleave(torch.arange(E), torch.tensor(SIZES))
    eager, exact = (
        torch.cat([x[s : s + 1].to(d) @ w[owner[s]].to(d) for s in range(10)])
        for d in (dtype, torch.float64)
    )
    assert_close_to_exact(make_groups().matmul(x, w), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [N, 8, 3])
def test_outer(dtype, n):
    u, x = random(10, n, dtype=dtype), random(10, K, dtype=dtype)
    sums = make_groups().outer(u, x)
    eager, exact = (
        torch.stack(
            [a.to(d).T @ b.to(d) for a, b in zip(u.split(SIZES), x.split(SIZES), strict=True)]
        )
        for d in (dtype, torch.float64)
    )
    assert_close_to_exact(sums, eager, exact)
    assert not sums[1].any()
    assert not sums[4].any()


def test_rows_that_overlap_or_are_not_aligned():
    w = random(E, K, N, dtype=torch.float32)
    expanded = random(1, K, dtype=torch.float32).expand(10, K)
    shifted = random(10 * K + 1, dtype=torch.float32)[1:].view(10, K)
    for x in (expanded, shifted):
        assert torch.equal(make_groups().matmul(x, w), make_groups().matmul(x.clone(), w))


def test_a_weight_of_another_dtype_is_cast():
    x, w = random(10, K, dtype=torch.bfloat16), random(E, K, N, dtype=torch.float32)
    groups = make_groups()
    torch.testing.assert_close(groups.matmul(x, w), groups.matmul(x, w.bfloat16()))


def test_no_rows_at_all():
    groups = make_groups([0] * E)
    assert groups.matmul(random(0, K), random(E, K, N)).shape == (0, N)
    assert not groups.outer(random(0, N), random(0, K)).any()


def test_what_the_grouped_gemm_leaves_alone_becomes_zero(monkeypatch, way):
    if way == "loop":
        pytest.skip("of the grouped GEMM")
    gemm = F.grouped_mm

    def careless(u, x, offs):
        y = gemm(u, x, offs=offs)
        y[1].fill_(float("nan"))
        return y

    monkeypatch.setattr(F, "grouped_mm", careless)
    assert not make_groups().outer(random(10, 8).float(), random(10, K).float())[1].any()


def test_the_grouped_gemm_is_taken_where_it_can_be(monkeypatch, way):
    if way == "loop":
        pytest.skip("of the grouped GEMM")
    calls, gemm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(a) or gemm(*a, **k))
    x, w = random(10, K).float(), random(E, K, N).float()
    make_groups().matmul(x, w)
    make_groups().outer(x, x)
    assert len(calls) == 2
    make_groups().matmul(x.double(), w.double())
    assert len(calls) == 2
