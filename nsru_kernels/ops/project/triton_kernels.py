"""Device code of the grouped projection: every adapter of a model in one persistent launch.

A *problem* is a basis with the rows of all adapters that use it. Its rows are cut into blocks of
BLOCK_R, and each block is worked off in items:

    along    partial T = A[:, chunk] U[chunk, BLOCK_OUT columns]   → workspace
             the last chunk to arrive sums the partials of its columns in order, and the last
             columns to be summed multiply by C where there is one
    remove   Ā[:, BLOCK_OUT columns] = A - T Uᵀ, once T is complete

``tables.py`` describes problems, rows and items to the kernel in int64. Bases, adapters and outputs
are reached through addresses in these tables: K, Q and the number of rows are no compile keys.
"""

import triton
import triton.language as tl

from nsru_kernels.ops.primitives import signal, take_ticket, wait_for

# A block with no more rows than this is padded to this many: the least M of a tensor-core product.
FEW_ROWS = tl.constexpr(16)
SUMMED_AT_ONCE = tl.constexpr(2)


@triton.jit(do_not_specialize=["n_rows", "n_items"])
def project_kernel(
    problems_ptr,  # int64: FIELDS each
    rows_ptr,  # int64: adapter rows | output rows
    items_ptr,  # int64
    workspace_ptr,  # float32: T of every problem, in parts
    counters_ptr,  # int32, zero: ticket | for each problem its blocks, then its blocks x tiles
    adapter_ptr,  # any adapter, basis and output: only their types are used
    basis_ptr,
    output_ptr,
    n_rows,
    n_items,
    FIELDS: tl.constexpr,
    HAS_GRAM_INVERSE: tl.constexpr,
    ALIGNED: tl.constexpr,  # all sizes, strides and addresses are multiples of 16; stride_q is 1
    BLOCK_R: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    ticket = take_ticket(counters_ptr)
    while ticket < n_items:
        item = tl.load(items_ptr + ticket)
        problem_ptr = problems_ptr + (item >> 32) * FIELDS
        rows = tl.load(problem_ptr + 8).to(tl.int32)
        blocks = tl.cdiv(rows, BLOCK_R)
        index = (item & 0xFFFFFFFF).to(tl.int32)
        rows -= (index % blocks) * BLOCK_R
        if rows <= FEW_ROWS:
            work_off(
                *(rows_ptr, workspace_ptr, counters_ptr, adapter_ptr, basis_ptr, output_ptr),
                *(problem_ptr, index, n_rows),
                *(HAS_GRAM_INVERSE, ALIGNED, BLOCK_R, FEW_ROWS, BLOCK_IN, BLOCK_OUT),
            )
        else:
            work_off(
                *(rows_ptr, workspace_ptr, counters_ptr, adapter_ptr, basis_ptr, output_ptr),
                *(problem_ptr, index, n_rows),
                *(HAS_GRAM_INVERSE, ALIGNED, BLOCK_R, BLOCK_R, BLOCK_IN, BLOCK_OUT),
            )
        ticket = take_ticket(counters_ptr)


@triton.jit
def work_off(
    rows_ptr,
    workspace_ptr,
    counters_ptr,
    adapter_ptr,
    basis_ptr,
    output_ptr,
    problem_ptr,
    index,
    n_rows,
    HAS_GRAM_INVERSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the tile that holds this block's rows
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One item of a problem, in a tile of HEIGHT rows."""
    u_ptr = tl.load(problem_ptr).to(basis_ptr.dtype)
    stride_k = tl.load(problem_ptr + 1)
    stride_q = tl.load(problem_ptr + 2)
    K = tl.load(problem_ptr + 4).to(tl.int32)
    Q = tl.load(problem_ptr + 5).to(tl.int32)
    chunk = tl.multiple_of(tl.load(problem_ptr + 6).to(tl.int32), BLOCK_IN)
    row = tl.load(problem_ptr + 7).to(tl.int32)
    rows = tl.load(problem_ptr + 8).to(tl.int32)
    workspace_ptr += tl.multiple_of(tl.load(problem_ptr + 9), BLOCK_OUT)
    counters_ptr += tl.load(problem_ptr + 10)
    if ALIGNED:
        u_ptr = tl.multiple_of(u_ptr, 16)
        stride_k = tl.multiple_of(stride_k, 16)
        stride_q = 1
        K = tl.multiple_of(K, 16)
        Q = tl.multiple_of(Q, 16)

    blocks = tl.cdiv(rows, BLOCK_R)
    tiles = tl.cdiv(Q, BLOCK_OUT)
    chunks = tl.cdiv(K, chunk)
    block = index % blocks
    index = index // blocks
    done_ptr = counters_ptr + block
    width = tiles * BLOCK_OUT  # the workspace has whole tiles: no masks for columns
    part_size = rows.to(tl.int64) * width

    offs_r = block * BLOCK_R + tl.arange(0, HEIGHT)
    row_mask = (offs_r < rows)[:, None]
    row_ptr = rows_ptr + row + offs_r
    a_ptrs = tl.load(row_ptr, mask=offs_r < rows, other=0).to(adapter_ptr.dtype)
    if ALIGNED:
        a_ptrs = tl.multiple_of(a_ptrs, 16)
    part_ptrs = workspace_ptr + offs_r.to(tl.int64)[:, None] * width  # [HEIGHT, 1]
    offs_q = tl.arange(0, BLOCK_OUT)[None, :]

    if index < tiles * chunks:
        tile = index % tiles
        nth = index // tiles
        q0 = tile * BLOCK_OUT
        k0 = tl.multiple_of(nth * chunk, BLOCK_IN)
        part = along(
            *(a_ptrs, row_mask, u_ptr, stride_k, stride_q, K, Q),
            *(k0, tl.minimum(k0 + chunk, K), q0, HEIGHT, BLOCK_IN, BLOCK_OUT),
        )
        tl.store(part_ptrs + nth * part_size + q0 + offs_q, part, mask=row_mask)
        arrived_ptr = counters_ptr + blocks + block * tiles + tile
        if signal(arrived_ptr) == chunks - 1:
            wait_for(arrived_ptr, chunks)  # only to see what the others stored
            sum_ptrs = part_ptrs + q0 + offs_q
            total = sum_parts(sum_ptrs, row_mask, chunks, part_size, HEIGHT, BLOCK_OUT)
            tl.store(sum_ptrs + chunks * part_size, total, mask=row_mask)
            summed = signal(done_ptr)
            if HAS_GRAM_INVERSE:  # noqa: SIM102 - known when compiling, the other is not
                if summed == tiles - 1:
                    wait_for(done_ptr, tiles)
                    core_ptr = tl.load(problem_ptr + 3).to(tl.pointer_type(tl.float32))
                    if ALIGNED:
                        core_ptr = tl.multiple_of(core_ptr, 16)
                    part_ptrs += chunks * part_size
                    apply_core(
                        *(part_ptrs, row_mask, part_size, core_ptr, Q),
                        *(HEIGHT, BLOCK_IN, BLOCK_OUT),
                    )
                    signal(done_ptr)
    else:
        out_ptrs = tl.load(row_ptr + n_rows, mask=offs_r < rows, other=0)
        out_ptrs = out_ptrs.to(output_ptr.dtype)
        if ALIGNED:
            out_ptrs = tl.multiple_of(out_ptrs, 16)
        wait_for(done_ptr, tiles + HAS_GRAM_INVERSE)
        remove(
            *(a_ptrs, out_ptrs, row_mask, part_ptrs + (chunks + HAS_GRAM_INVERSE) * part_size),
            *(u_ptr, stride_k, stride_q, K, Q),
            *((index - tiles * chunks) * BLOCK_OUT, HEIGHT, BLOCK_IN, BLOCK_OUT),
        )


@triton.jit
def along(
    a_ptrs,
    row_mask,
    u_ptr,
    stride_k,
    stride_q,
    K,
    Q,
    start,
    stop,
    q0,
    HEIGHT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """A U over channels start to stop, for one tile of columns of U. [HEIGHT, BLOCK_OUT]"""
    offs_q = q0 + tl.arange(0, BLOCK_OUT)
    result = tl.zeros([HEIGHT, BLOCK_OUT], tl.float32)
    for k0 in range(start, stop, BLOCK_IN):
        offs_k = k0 + tl.arange(0, BLOCK_IN)
        a_mask = row_mask & (offs_k < K)[None, :]
        a = tl.load(a_ptrs[:, None] + offs_k[None, :], mask=a_mask, other=0.0)
        u_mask = (offs_k < K)[:, None] & (offs_q < Q)[None, :]
        u_ptrs = u_ptr + offs_k.to(tl.int64)[:, None] * stride_k + offs_q[None, :] * stride_q
        u = tl.load(u_ptrs, mask=u_mask, other=0.0)  # [BLOCK_IN, BLOCK_OUT]
        result += product(a.to(tl.float32), u.to(tl.float32), u.dtype != tl.float32)
    return result


@triton.jit
def remove(
    a_ptrs,
    out_ptrs,
    row_mask,
    along_ptrs,
    u_ptr,
    stride_k,
    stride_q,
    K,
    Q,
    k0,
    HEIGHT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Ā = A - T Uᵀ for BLOCK_OUT channels from k0."""
    offs_k = tl.multiple_of(k0, BLOCK_OUT) + tl.arange(0, BLOCK_OUT)
    mask = row_mask & (offs_k < K)[None, :]
    taken = tl.zeros([HEIGHT, BLOCK_OUT], tl.float32)
    for q0 in range(0, Q, BLOCK_IN):
        offs_q = q0 + tl.arange(0, BLOCK_IN)
        t = tl.load(along_ptrs + offs_q[None, :], mask=row_mask, other=0.0)  # [HEIGHT, BLOCK_IN]
        u_mask = (offs_k < K)[:, None] & (offs_q < Q)[None, :]
        u_ptrs = u_ptr + offs_k.to(tl.int64)[:, None] * stride_k + offs_q[None, :] * stride_q
        # The second and last use of these bytes: let them leave L2 first.
        u = tl.load(u_ptrs, mask=u_mask, other=0.0, eviction_policy="evict_first")
        taken += product(t, tl.trans(u.to(tl.float32)), u.dtype != tl.float32)
    a = tl.load(a_ptrs[:, None] + offs_k[None, :], mask=mask, other=0.0)
    tl.store(out_ptrs[:, None] + offs_k[None, :], a.to(tl.float32) - taken, mask=mask)


@triton.jit
def sum_parts(part_ptrs, row_mask, parts, part_size, HEIGHT: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """The parts added up, always in the same order. [HEIGHT, BLOCK_OUT]"""
    total = tl.zeros([HEIGHT, BLOCK_OUT], tl.float32)
    for first in range(0, parts, SUMMED_AT_ONCE):  # independent loads
        for i in tl.static_range(SUMMED_AT_ONCE):
            mask = row_mask & (tl.full([1, 1], first + i, tl.int32) < parts)
            total += tl.load(part_ptrs + (first + i) * part_size, mask=mask, other=0.0)
    return total


@triton.jit
def apply_core(
    along_ptrs,
    row_mask,
    part_size,
    core_ptr,
    Q,
    HEIGHT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """The next part of the workspace = this part times C [Q, Q]."""
    for p0 in range(0, Q, BLOCK_OUT):
        offs_p = p0 + tl.arange(0, BLOCK_OUT)
        result = tl.zeros([HEIGHT, BLOCK_OUT], tl.float32)
        for q0 in range(0, Q, BLOCK_IN):
            offs_q = q0 + tl.arange(0, BLOCK_IN)
            t = tl.load(along_ptrs + offs_q[None, :], mask=row_mask, other=0.0)
            c_mask = (offs_q < Q)[:, None] & (offs_p < Q)[None, :]
            c_ptrs = core_ptr + offs_q.to(tl.int64)[:, None] * Q + offs_p[None, :]
            result += product(t, tl.load(c_ptrs, mask=c_mask, other=0.0), False)
        tl.store(along_ptrs + part_size + offs_p[None, :], result, mask=row_mask)


@triton.jit
def product(x, y, Y_IS_SHORT: tl.constexpr):
    """x y from TF32 tensor cores, with float32's accuracy.

    The caller adds the result up: that is one rounding per tile in float32, where tensor cores
    that accumulate by themselves truncate at every step.
    """
    if Y_IS_SHORT:
        # y was 16 bits wide, so TF32 holds it exactly: two products, where others need three.
        # Rounded to TF32's 19 bits, not cut: what tensor cores drop of the rest would add up.
        high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        low = tl.dot(x - high, y, input_precision="tf32")
        return tl.dot(high, y, low, input_precision="tf32")
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit(do_not_specialize=["words"])
def write_table_kernel(table_ptr, words):
    """Words into a table. A CUDA graph keeps arguments, but no host memory to copy from."""
    for i in tl.static_range(len(words)):
        tl.store(table_ptr + i, words[i])
