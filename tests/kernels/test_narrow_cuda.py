"""The narrow products of the CUDA backend against float64, emulated; marked gpu: on a device."""

import functools

import pytest
import torch
from tolerance import assert_close_to_exact

from nsru_kernels.dispatch import extension
from nsru_kernels.ops.linear import cuda_products as products
from nsru_kernels.ops.products import one_read_pays

GPU = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]
# (M, C, R): one element; edges in M, C and R; splits of C; splits of M; ranks in several blocks.
SHAPES = [
    (1, 8, 1), (130, 72, 3), (16, 2048, 8), (17, 1160, 16), (700, 264, 17), (200, 520, 32),
    (70, 136, 64), (33, 200, 100),
]  # fmt: skip
REAL = [(8192, 4096, 16), (8191, 14336, 16), (16384, 2048, 64), (4096, 4096, 200)]


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


def check(x, v, p):
    """Both products, each by itself and from one read; results also into rows of a wider matrix."""
    m, r = x.shape[0], v.shape[0]
    # PyTorch's bf16 product on a CPU with AMX takes NaN from between the rows.
    dense_x, dense_p = x.contiguous(), p.contiguous()
    exact, eager = x.double() @ v.double().T, dense_x @ v.contiguous().T
    assert_close_to_exact(products.rows_product(x, v), eager, exact, "rows")
    inside = x.new_full((m, r + 5), 7.0)[:, 2 : 2 + r]
    products.rows_product(x, v, scaling=-0.5, out=inside)
    assert_close_to_exact(inside, -0.5 * eager, -0.5 * exact, "rows, scaled")
    exact_d, eager_d = 1.7 * (x.double().T @ p.double()), 1.7 * (dense_x.T @ dense_p)
    for rank_first in (False, True):
        d = products.columns_product(x, p, 1.7, rank_first=rank_first)
        assert_close_to_exact(d.T if rank_first else d, eager_d, exact_d, "columns")
    if one_read_pays(r):
        d = products.columns_product(
            x, p, 1.7, rank_first=False, v_CR=v.T.contiguous(), rows_out=inside, rows_scaling=3.0
        )
        assert_close_to_exact(inside, 3 * eager, 3 * exact, "rows of both")
        assert_close_to_exact(d, eager_d, exact_d, "columns of both")
    around = inside._base
    assert (around[:, :2] == 7).all()
    assert (around[:, 2 + r :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(emulated, shape, dtype):
    x, v, p = draw(*shape, dtype)
    check(x, v, products.padded(p))


def test_nothing_beyond_the_operands_is_used(emulated):
    for shape in ((45, 88, 3), (130, 264, 20)):
        check(*map(surrounded, draw(*shape, torch.bfloat16)))


def test_both_products_are_the_same_every_time(emulated):
    x, v, p = draw(300, 600, 16, torch.bfloat16)
    runs = [
        (products.rows_product(x, v), products.columns_product(x, p, 1.0, rank_first=True))
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_wrong_arguments_are_named(emulated):
    x, v, p = draw(16, 64, 3, torch.bfloat16)
    for call, reason in (
        (lambda: products.rows_product(x[:, 1:], v[:, 1:]), "c=63 must be a multiple of 8"),
        (lambda: products.rows_product(x[:, 4:60], v[:, 4:60]), "x must start at a multiple of 16"),
        (lambda: products.rows_product(x.T, v), r"x must be row-major, got strides \(1, 64\)"),
        (lambda: products.rows_product(x, v.half()), "v is torch.float16"),
        (lambda: products.columns_product(x, p, 1.0, rank_first=True), "ldp=3: rows of p"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu():
    reason = extension.unavailable("linear", GPU)
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
def test_two_runs_agree_bit_by_bit_on_a_gpu(on_gpu):
    x, v, p = draw(8192, 4096, 16, torch.bfloat16, GPU)
    both = functools.partial(
        products.columns_product, x, p, 1.0, rank_first=False, v_CR=v.T.contiguous()
    )
    runs = []
    for _ in range(3):
        rows = torch.empty_like(p)
        runs.append((products.rows_product(x, v), both(rows_out=rows), rows))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
