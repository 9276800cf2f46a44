"""Device code of the K-extended GEMMs: [X ∣ P]·[W ; s V] with several operand sources and no copy.

    kext_kernel         y = x Wᵀ + s S Bᵀ + b, and dX = Σ dY_i W_i + dS Ā of up to three linears
    kext_tma_kernel     the same for sm_90 and newer
    decode_kernel       y and S of at most 16 tokens

The frozen GEMM runs as it always does, and the product of P and s V is added to its accumulator.
P and V are loaded before it where holding them does not spill (R ≤ 64 by TMA; by pointers R ≤ 16
and one source), else behind it. With dropout the accumulator starts from the low-rank product: a
mask behind the GEMM would need a second one.
"""

import triton
import triton.language as tl

from nsru_kernels.ops.linear.triton_narrow_kernels import BY_TOKENS
from nsru_kernels.ops.primitives import kept, kept_scale


@triton.jit
def low_rank_factors(
    p_ptr, v_ptr, rows, columns, first_rank, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """P [BLOCK_M, BLOCK_R] and s V [BLOCK_R, BLOCK_N] of a tile and a block of ranks."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    p = tl.load(
        p_ptr + rows.to(tl.int64)[:, None] * stride_pm + ranks[None, :],
        mask=(rows[:, None] < M) & (ranks[None, :] < R),
        other=0.0,
    )
    v = tl.load(
        v_ptr + ranks[:, None] * stride_vr + columns.to(tl.int64)[None, :] * stride_vn,
        mask=(ranks[:, None] < R) & (columns[None, :] < N),
        other=0.0,
    )
    return p, (v.to(tl.float32) * scaling).to(v.dtype)


@triton.jit
def add_low_rank(
    acc, p_ptr, v_ptr, rows, columns, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + P[rows, :] s V[:, columns]."""
    for start in range(0, R, BLOCK_R):
        p, v = low_rank_factors(
            p_ptr, v_ptr, rows, columns, start, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
            BLOCK_R,
        )  # fmt: skip
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dropped(acc, rows, columns, scaling, seed, dropout_p):
    """scaling · acc where the mask keeps, and divided by the share that is kept."""
    acc *= scaling * kept_scale(dropout_p)
    return tl.where(kept(seed, rows, columns, dropout_p), acc, 0.0)


@triton.jit
def add_bias(acc, bias_ptr, columns, N):
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block number ``index``: GROUP_M rows of tiles at a time, so that L2 keeps W's
    columns between them."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = index // group_size * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    in_group = index % group_size
    return first_m + in_group % group_m, in_group // group_m


@triton.jit
def add_product(
    acc, x_ptr, w_ptr, rows, columns, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + X[rows, :] W[:, columns]."""
    # Rows outside are read from the last one inside and never stored. Columns are masked: where W's
    # are adjacent, no other way leaves the compiler sure of it, and its loads wide.
    x_ptr += tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm
    w_ptr += columns.to(tl.int64)[None, :] * stride_wn
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + ks.to(tl.int64)[None, :] * stride_xk, mask=ks[None, :] < K, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_ptr + ks.to(tl.int64)[:, None] * stride_wk,
            mask=(ks[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product_tma(
    acc, x_desc, w_desc, first_row, first_column, K,
    W_IS_NK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same by TMA, which fills what lies outside X and W with zeros."""
    for start in range(0, K, BLOCK_K):
        x = x_desc.load([first_row, start])  # [BLOCK_M, BLOCK_K]
        if W_IS_NK:
            w = tl.trans(w_desc.load([first_column, start]))  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([start, first_column])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_tile(acc, out_ptr, rows, columns, M, N):
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


@triton.jit(do_not_specialize=BY_TOKENS)
def kext_kernel(
    x1_ptr, w1_ptr, x2_ptr, w2_ptr, x3_ptr, w3_ptr, out_ptr, p_ptr, v_ptr, bias_ptr,
    M, N, K1, K2, K3, R,
    stride_x1m, stride_x1k, stride_x2m, stride_x2k, stride_x3m, stride_x3k,
    stride_w1k, stride_w1n, stride_w2k, stride_w2n, stride_w3k, stride_w3n,
    stride_pm, stride_vr, stride_vn,
    scaling, seed, dropout_p,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = [X1 ∣ X2 ∣ X3 ∣ P] · [W1 ; W2 ; W3 ; s V] + bias of the first COUNT sources.

    HELD: P and V are one block of ranks, loaded before the first source; out is stored once."""
    row_block, column_block = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HELD:
        p, v = low_rank_factors(
            p_ptr, v_ptr, rows, columns, 0, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
            BLOCK_R,
        )  # fmt: skip
    elif DROPOUT:
        acc = add_low_rank(
            acc, p_ptr, v_ptr, rows, columns, M, N, R, stride_pm, stride_vr, stride_vn, 1.0,
            PRECISION, BLOCK_R,
        )  # fmt: skip
        acc = dropped(acc, rows, columns, scaling, seed, dropout_p)
    acc = add_product(
        acc, x1_ptr, w1_ptr, rows, columns, M, N, K1, stride_x1m, stride_x1k,
        stride_w1k, stride_w1n, PRECISION, BLOCK_K,
    )  # fmt: skip
    if COUNT > 1:
        acc = add_product(
            acc, x2_ptr, w2_ptr, rows, columns, M, N, K2, stride_x2m, stride_x2k,
            stride_w2k, stride_w2n, PRECISION, BLOCK_K,
        )  # fmt: skip
    if COUNT > 2:
        acc = add_product(
            acc, x3_ptr, w3_ptr, rows, columns, M, N, K3, stride_x3m, stride_x3k,
            stride_w3k, stride_w3n, PRECISION, BLOCK_K,
        )  # fmt: skip
    if HELD:
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    elif not DROPOUT:
        acc = add_low_rank(
            acc, p_ptr, v_ptr, rows, columns, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
            PRECISION, BLOCK_R,
        )  # fmt: skip
    acc = add_bias(acc, bias_ptr, columns, N)
    store_tile(acc, out_ptr, rows, columns, M, N)


@triton.jit(do_not_specialize=BY_TOKENS)
def kext_tma_kernel(
    x1_desc, w1_desc, x2_desc, w2_desc, x3_desc, w3_desc, out_desc, p_ptr, v_ptr, bias_ptr,
    M, N, K1, K2, K3, R, stride_pm, stride_vr, stride_vn,
    scaling, seed, dropout_p,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
    W_IS_NK: tl.constexpr, STORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """``kext_kernel`` for sm_90 and newer: TMA descriptors, and programs that stay for many tiles.

    W_IS_NK: the summed dimension is W's last, as in the forward pass. STORED: columns of a tile
    that are stored at a time, all or half of them: what waits to be stored takes shared memory.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_of(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HELD:
            p, v = low_rank_factors(
                p_ptr, v_ptr, rows, columns, 0, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
                BLOCK_R,
            )  # fmt: skip
        elif DROPOUT:
            acc = add_low_rank(
                acc, p_ptr, v_ptr, rows, columns, M, N, R, stride_pm, stride_vr, stride_vn, 1.0,
                PRECISION, BLOCK_R,
            )  # fmt: skip
            acc = dropped(acc, rows, columns, scaling, seed, dropout_p)
        acc = add_product_tma(
            acc, x1_desc, w1_desc, first_row, first_column, K1, W_IS_NK, PRECISION, BLOCK_K
        )
        if COUNT > 1:
            acc = add_product_tma(
                acc, x2_desc, w2_desc, first_row, first_column, K2, W_IS_NK, PRECISION, BLOCK_K
            )
        if COUNT > 2:
            acc = add_product_tma(
                acc, x3_desc, w3_desc, first_row, first_column, K3, W_IS_NK, PRECISION, BLOCK_K
            )
        if HELD:
            acc = tl.dot(p, v, acc, input_precision=PRECISION)
        elif not DROPOUT:
            acc = add_low_rank(
                acc, p_ptr, v_ptr, rows, columns, M, N, R, stride_pm, stride_vr, stride_vn, scaling,
                PRECISION, BLOCK_R,
            )  # fmt: skip
        acc = add_bias(acc, bias_ptr, columns, N)
        if BLOCK_N > STORED:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out_desc.store([first_row, first_column], left.to(out_desc.dtype))
            out_desc.store([first_row, first_column + BLOCK_N // 2], right.to(out_desc.dtype))
        else:
            out_desc.store([first_row, first_column], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=BY_TOKENS)
def decode_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, s_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y and S in one launch for M ≤ BLOCK_M. Reading W is the work; every program computes S again
    from x and Ā, which L2 holds."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * stride_xm + ks[None, :] * stride_xk,
            mask=(rows[:, None] < M) & (ks[None, :] < K),
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_ptr + columns.to(tl.int64)[None, :] * stride_wn + ks[:, None] * stride_wk,
            mask=(columns[None, :] < N) & (ks[:, None] < K),
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        a = tl.load(
            a_ptr + ranks[None, :] * K + ks[:, None],
            mask=(ranks[None, :] < R) & (ks[:, None] < K),
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        y = tl.dot(x, w, y, input_precision=PRECISION)
        s = tl.dot(x, a, s, input_precision=PRECISION)
    in_s = (rows[:, None] < M) & (ranks[None, :] < R)
    rounded = s.to(s_ptr.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(s_ptr + rows[:, None] * stride_sm + ranks[None, :], rounded, mask=in_s)
    b = tl.load(
        b_ptr + columns.to(tl.int64)[None, :] * R + ranks[:, None],
        mask=(columns[None, :] < N) & (ranks[:, None] < R),
        other=0.0,
    )  # [BLOCK_R, BLOCK_N]
    y += scaling * tl.dot(rounded, b, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        y += bias.to(tl.float32)[None, :]
    store_tile(y, y_ptr, rows, columns, M, N)
