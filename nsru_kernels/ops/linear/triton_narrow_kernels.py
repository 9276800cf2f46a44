"""Device code of the narrow products: long sums with few columns, bound by reading X once.

    shrink_kernel    P = X V          S = drop(x) Āᵀ and dS = dY B
    columns_kernel   D = Xᵀ P         dB = dYᵀ S and dĀᵀ = drop(x)ᵀ dS; on request X V as well

X [M, C] may have any strides, its rows 64-bit offsets. What several programs add to goes through
float32 partials and ``sum_partials_kernel``, in a fixed order.
"""

import triton
import triton.language as tl

from nsru_kernels.ops.primitives import kept, kept_scale

# Sizes that follow the number of tokens must not select another compiled kernel.
BY_TOKENS = ("M", "seed")


@triton.jit
def load_dropped(
    x_ptr, rows, columns, M, C, stride_xm, stride_xc, seed, dropout_p, DROPOUT: tl.constexpr
):
    """A tile of drop(x); zero outside."""
    pointers = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    pointers += columns.to(tl.int64)[None, :] * stride_xc
    x = tl.load(pointers, mask=(rows[:, None] < M) & (columns[None, :] < C), other=0.0)
    if DROPOUT:
        keep = kept(seed, rows, columns, dropout_p)
        x = tl.where(keep, x.to(tl.float32) * kept_scale(dropout_p), 0.0).to(x.dtype)
    return x


@triton.jit(do_not_specialize=BY_TOKENS)
def shrink_kernel(
    x_ptr, v_ptr, out_ptr,
    M, C, R, columns_per_split,
    stride_xm, stride_xc, stride_vc, stride_vr,
    seed, dropout_p,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split, M, R] = drop(X)[:, split] V[split, :]; one program a split, row and rank block."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * columns_per_split
    p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(first, min(first + columns_per_split, C), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        x = load_dropped(
            x_ptr, rows, columns, M, C, stride_xm, stride_xc, seed, dropout_p, DROPOUT
        )  # [BLOCK_M, BLOCK_C]
        v = tl.load(
            v_ptr + columns.to(tl.int64)[:, None] * stride_vc + ranks[None, :] * stride_vr,
            mask=(columns[:, None] < C) & (ranks[None, :] < R),
            other=0.0,
        )  # [BLOCK_C, BLOCK_R]
        p = tl.dot(x, v, p, input_precision=PRECISION)
    out_ptr += split.to(tl.int64) * M * R
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :],
        p,
        mask=(rows[:, None] < M) & (ranks[None, :] < R),
    )


@triton.jit(do_not_specialize=BY_TOKENS)
def columns_kernel(
    x_ptr, p_ptr, v_ptr, d_ptr, rows_ptr,
    M, C, R, rows_per_split,
    stride_xm, stride_xc, stride_pm, stride_dc, stride_dr,
    seed, dropout_p,
    DROPOUT: tl.constexpr, WITH_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d[split, C, R] = drop(X)[split, :]ᵀ P[split, :], and rows[column block, M, R] = X V.

    V [C, R] is contiguous. A program keeps one column block and walks down its share of the rows,
    so that each element of X is read once for both products.
    """
    column_block = tl.program_id(0)
    columns = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    inside = (columns[:, None] < C) & (ranks[None, :] < R)
    if WITH_ROWS:
        v = tl.load(
            v_ptr + columns.to(tl.int64)[:, None] * R + ranks[None, :], mask=inside, other=0.0
        )  # [BLOCK_C, BLOCK_R]
        rows_ptr += column_block.to(tl.int64) * M * R
    d = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_p = (rows[:, None] < M) & (ranks[None, :] < R)
        x = load_dropped(
            x_ptr, rows, columns, M, C, stride_xm, stride_xc, seed, dropout_p, DROPOUT
        )  # [BLOCK_M, BLOCK_C]
        p = tl.load(
            p_ptr + rows.to(tl.int64)[:, None] * stride_pm + ranks[None, :], mask=in_p, other=0.0
        )  # [BLOCK_M, BLOCK_R]
        d = tl.dot(tl.trans(x), p, d, input_precision=PRECISION)
        if WITH_ROWS:
            product = tl.dot(x, v, input_precision=PRECISION)
            out = rows_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
            tl.store(out, product, mask=in_p)
    d_ptr += split.to(tl.int64) * C * R
    d_offsets = columns.to(tl.int64)[:, None] * stride_dc + ranks[None, :] * stride_dr
    tl.store(d_ptr + d_offsets, d, mask=inside)


@triton.jit(do_not_specialize=("size", "parts"))
def sum_partials_kernel(
    partials_ptr, out_ptr, size, parts, row_length, stride_out, scaling, BLOCK: tl.constexpr
):
    """out = scaling · Σ partials, added in order; rows of out are stride_out apart."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(partials_ptr + offsets, mask=inside, other=0.0)
        partials_ptr += size
    out_ptr += offsets // row_length * stride_out + offsets % row_length
    tl.store(out_ptr, (scaling * total).to(out_ptr.dtype.element_ty), mask=inside)
