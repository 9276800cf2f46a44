"""The narrow product of the CUDA backend against float64, emulated; marked gpu: on a device."""

import pytest
import torch
from tolerance import assert_close_to_exact

from nsru_kernels.dispatch import extension
from nsru_kernels.ops.linear import cuda_products as products

GPU = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]
# (M, C, R): one element; edges in M, C and R; one block along C; splits of M; many blocks along C.
SHAPES = [
    (1, 8, 1), (130, 72, 3), (16, 2048, 8), (17, 1160, 16), (700, 264, 17), (200, 520, 32),
    (700, 136, 32),
]  # fmt: skip
REAL = [(8192, 4096, 16), (8191, 14336, 16), (16384, 2048, 32), (4096, 4096, 1)]


def draw(m, c, r, dtype, device="cpu", seed=0):
    """(X, V [R, C], P)."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=g) for shape in ((m, c), (r, c), (m, r))]
    tensors[1] /= c**0.5
    return [tensor.to(device, dtype) for tensor in tensors]


def surrounded(matrix):
    """The same values with NaN before, behind and between the rows."""
    rows, columns = matrix.shape
    wide = matrix.new_full((rows + 2, -(-columns // 8) * 8 + 16), float("nan"))
    wide[1:-1, 8 : 8 + columns] = matrix
    return wide[1:-1, 8 : 8 + columns]


def both(x, v, p, rows):
    """1.7 Xᵀ P, and ``rows`` = -0.5 X Vᵀ."""
    v_CR = v.T.contiguous()
    return products.columns_product(x, p, 1.7, v_CR=v_CR, rows_out=rows, rows_scaling=-0.5)


def check(x, v, p):
    """Both results, that of the rows also into rows of a wider matrix."""
    m, r = x.shape[0], v.shape[0]
    # PyTorch's bf16 product on a CPU with AMX takes NaN from between the rows.
    dense_x, dense_p = x.contiguous(), p.contiguous()
    exact, eager = -0.5 * (x.double() @ v.double().T), -0.5 * (dense_x @ v.contiguous().T)
    exact_d, eager_d = 1.7 * (x.double().T @ p.double()), 1.7 * (dense_x.T @ dense_p)
    wide = x.new_full((m, r + 5), 7.0)
    for rows in (x.new_empty(m, r), wide[:, 2 : 2 + r]):
        assert_close_to_exact(both(x, v, p, rows), eager_d, exact_d, "columns")
        assert_close_to_exact(rows, eager, exact, "rows")
    assert (wide[:, :2] == 7).all()
    assert (wide[:, 2 + r :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(emulated, shape, dtype):
    x, v, p = draw(*shape, dtype)
    check(x, v, products.padded(p))


def test_nothing_beyond_the_operands_is_used(emulated):
    for shape in ((45, 88, 3), (130, 264, 20)):
        check(*map(surrounded, draw(*shape, torch.bfloat16)))


def test_both_results_are_the_same_every_time(emulated):
    x, v, p = draw(300, 600, 16, torch.bfloat16)
    assert_same_every_time(x, v, p, 2)


def assert_same_every_time(x, v, p, times):
    runs = []
    for _ in range(times):
        rows = torch.empty_like(p)
        runs.append((both(x, v, p, rows), rows))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_an_empty_batch_adds_nothing(emulated):
    x, v, p = draw(0, 24, 3, torch.bfloat16)
    assert torch.equal(
        both(x, v, products.padded(p), torch.empty_like(p)), torch.zeros(24, 3).bfloat16()
    )


def test_wrong_arguments_are_named(emulated):
    x, v, p = draw(16, 64, 8, torch.bfloat16)
    wide = draw(16, 64, 40, torch.bfloat16)
    for arguments, reason in (
        ((x[:, 1:], v[:, 1:], p), "c=63 must be a multiple of 8"),
        ((x[:, 4:60], v[:, 4:60], p), "x must start at a multiple of 16"),
        ((x.T, v, p), r"x must be row-major, got strides \(1, 64\)"),
        ((x, v.half(), p), "v is torch.float16"),
        ((x, v[:3], p[:, :3].contiguous()), "ldp=3: rows of p"),
        (wide, "r=40 must be at most 32"),
    ):
        with pytest.raises(ValueError, match=reason):
            both(*arguments, torch.empty_like(arguments[2]))


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu():
    reason = extension.unavailable(GPU)
    return pytest.skip(reason) if reason else None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_on_a_gpu(on_gpu, poisoned_memory, shape, dtype):
    x, v, p = draw(*shape, dtype, GPU)
    check(x, v, products.padded(p))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_on_a_gpu(on_gpu, poisoned_memory, shape, dtype):
    x, v, p = draw(*shape, dtype, GPU)
    check(x, v, products.padded(p))


@pytest.mark.gpu
def test_runs_agree_bit_by_bit_on_a_gpu(on_gpu):
    assert_same_every_time(*draw(8192, 4096, 16, torch.bfloat16, GPU), 3)
