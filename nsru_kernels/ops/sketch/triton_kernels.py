"""Device code of the sketch update: S = round(x Ω), [Y ; H] += [x ∣ S]ᵀ S, ‖x‖².

Y and H are treated as one matrix of K + L rows, cut into BLOCK_K x BLOCK_L tiles; tiles of Y read
their left factor from x, tiles of H from S. S is padded to `width` columns, a multiple of 16.
"""

import triton
import triton.language as tl

from nsru_kernels.ops.primitives import signal, take_ticket, wait_for


@triton.jit(do_not_specialize=["m"])
def sketch_rows_kernel(
    x_ptr, omega_ptr, mask_ptr, s_ptr, energy_ptr, m, k, width, stride_xm, stride_xk,
    SPLIT: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, STEP_K: tl.constexpr,
):  # fmt: skip
    """S [PLANES, M, width]; one tile a program, those of a row block side by side."""
    l_tiles = tl.cdiv(width, BLOCK_L)
    block, l_tile = tl.program_id(0) // l_tiles, tl.program_id(0) % l_tiles
    s = _project(
        x_ptr, omega_ptr, mask_ptr, energy_ptr + block, block, l_tile, 0, k, m, width,
        stride_xm, stride_xk, PRECISION, BLOCK_M, BLOCK_L, STEP_K,
    )  # fmt: skip
    _store_rounded(s, s_ptr, block, l_tile, m, width, SPLIT, LARGEST, BLOCK_M, BLOCK_L)


@triton.jit(do_not_specialize=["m", "rows", "parts", "energies"])
def add_products_kernel(
    x_ptr, s_ptr, mask_ptr, y_ptr, h_ptr, parts_ptr, energy_ptr, trace_ptr,
    m, k, width, out_width, stride_xm, stride_xk, rows, parts, energies, limit,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, STEP_M: tl.constexpr,
):  # fmt: skip
    """One tile of [x ∣ S]ᵀ S over `rows` rows: stored to a part, or added to y and h.

    The number of parts follows the number of tokens, so it is no compile key.
    """
    tiles = tl.cdiv(k, BLOCK_K) + tl.cdiv(out_width, BLOCK_K)
    l_tiles = tl.cdiv(out_width, BLOCK_L)
    part = tl.program_id(0) // (tiles * l_tiles)
    tile = tl.program_id(0) // l_tiles % tiles
    l_tile = tl.program_id(0) % l_tiles
    product = _product(
        x_ptr, s_ptr, mask_ptr, tile, l_tile, part * rows, tl.minimum(m, (part + 1) * rows),
        m, k, width, stride_xm, stride_xk, PLANES, PRECISION, BLOCK_K, BLOCK_L, STEP_M,
    )  # fmt: skip
    trace = _sum_energies(energy_ptr, energies)
    if tl.program_id(0) == 0:
        tl.store(trace_ptr, trace)
    if parts > 1:
        part_ptr = parts_ptr + part.to(tl.int64) * (k + out_width) * out_width
        start, offsets, exists = _locate(tile, l_tile, k, out_width, BLOCK_K, BLOCK_L)
        tl.store(part_ptr + start + offsets, product, mask=exists)
    elif trace < limit:
        _add_to_state(product, y_ptr, h_ptr, tile, l_tile, k, out_width, BLOCK_K, BLOCK_L)


@triton.jit(do_not_specialize=["parts"])
def sum_splits_kernel(
    parts_ptr, y_ptr, h_ptr, trace_ptr, k, out_width, parts, limit, BLOCK: tl.constexpr
):
    """[y ; h] += the parts in their order, unless the batch was bad."""
    if tl.load(trace_ptr) < limit:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y_size = tl.cast(k, tl.int64) * out_width
        size = y_size + out_width * out_width
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(parts):
            total += tl.load(parts_ptr + part * size + offsets, mask=offsets < size, other=0.0)
        in_y = offsets < y_size
        in_h = (offsets >= y_size) & (offsets < size)
        tl.store(y_ptr + offsets, tl.load(y_ptr + offsets, mask=in_y) + total, mask=in_y)
        h_ptrs = h_ptr + (offsets - y_size)
        tl.store(h_ptrs, tl.load(h_ptrs, mask=in_h) + total, mask=in_h)


@triton.jit(
    do_not_specialize=["m", "panels", "panel_blocks", "k_steps", "k_chunks", "m_chunk", "m_chunks"]
)
def read_once_kernel(
    x_ptr, omega_ptr, mask_ptr, y_ptr, h_ptr, s_ptr, wide_s_ptr, sums_ptr, energy_ptr, trace_ptr,
    counters_ptr, m, k, width, out_width, stride_xm, stride_xk,
    panels, panel_blocks, k_steps, k_chunks, m_chunk, m_chunks, limit,
    SPLIT: tl.constexpr, PLANES: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
    STEP_K: tl.constexpr, STEP_M: tl.constexpr,
):  # fmt: skip
    """The whole update in one launch of persistent programs.

    Rows are cut into panels of `panel_blocks` row blocks. Work items in ticket order, S before the
    products of a panel and one panel ahead:

        S(0)  S(1) P(0)  S(2) P(1)  ...  S(last) P(last-1)  P(last)

    Both kinds split their sum into chunks so that a panel has work for every multiprocessor; chunks
    of a tile are computed side by side and added in turn, so the order of sums is fixed.
    """
    l_tiles = tl.cdiv(width, BLOCK_L)
    tiles = tl.cdiv(k, BLOCK_K) + tl.cdiv(out_width, BLOCK_K)
    s_items = k_chunks * panel_blocks * l_tiles
    p_items = m_chunks * tiles * l_tiles
    # counters: the ticket, S tiles ready in each panel, turns of S tiles, turns of [Y ; H] tiles
    ready_ptr = counters_ptr + 1
    s_turns_ptr = ready_ptr + panels
    p_turns_ptr = s_turns_ptr + panels * panel_blocks * l_tiles

    ticket = take_ticket(counters_ptr)
    while ticket < panels * (s_items + p_items):
        later = ticket - s_items
        group = tl.maximum(later, 0) // (s_items + p_items)
        item = later - group * (s_items + p_items)
        ahead = group + 1 < panels  # the last panel's products have no S beside them
        if (later < 0) | (ahead & (item < s_items)):
            _s_item(
                x_ptr, omega_ptr, mask_ptr, s_ptr, wide_s_ptr, energy_ptr, ready_ptr, s_turns_ptr,
                tl.where(later < 0, 0, group + 1), tl.where(later < 0, ticket, item),
                m, k, width, stride_xm, stride_xk, panel_blocks, k_steps, k_chunks,
                SPLIT, LARGEST, PRECISION, BLOCK_M, BLOCK_L, STEP_K,
            )  # fmt: skip
        else:
            _product_item(
                x_ptr, s_ptr, mask_ptr, y_ptr, h_ptr, sums_ptr, energy_ptr, trace_ptr,
                ready_ptr, p_turns_ptr, group, tl.where(ahead, item - s_items, item),
                m, k, width, out_width, stride_xm, stride_xk,
                panels, panel_blocks * BLOCK_M, panel_blocks * l_tiles, m_chunk, m_chunks,
                panels * panel_blocks * k_chunks, limit,
                PLANES, PRECISION, BLOCK_K, BLOCK_L, STEP_M,
            )  # fmt: skip
        ticket = take_ticket(counters_ptr)


@triton.jit
def _s_item(
    x_ptr, omega_ptr, mask_ptr, s_ptr, wide_s_ptr, energy_ptr, ready_ptr, turns_ptr, panel, item,
    m, k, width, stride_xm, stride_xk, panel_blocks, k_steps, k_chunks,
    SPLIT: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, STEP_K: tl.constexpr,
):  # fmt: skip
    """A tile of x Ω over one chunk of K; the last chunk's program rounds the sum to S."""
    l_tiles = tl.cdiv(width, BLOCK_L)
    chunk = item // (panel_blocks * l_tiles)
    block = panel * panel_blocks + item // l_tiles % panel_blocks
    l_tile = item % l_tiles
    # No steps for the blocks that the last panel lacks.
    k_start = chunk * (k_steps * STEP_K)  # known to be aligned
    k_stop = tl.where(block * BLOCK_M < m, tl.minimum(k, k_start + k_steps * STEP_K), 0)
    s = _project(
        x_ptr, omega_ptr, mask_ptr, energy_ptr + block * k_chunks + chunk, block, l_tile,
        k_start, k_stop, m, width, stride_xm, stride_xk,
        PRECISION, BLOCK_M, BLOCK_L, STEP_K,
    )  # fmt: skip
    turn_ptr = turns_ptr + block * l_tiles + l_tile
    start, offsets, exists = _locate_s(block, l_tile, m, width, BLOCK_M, BLOCK_L)
    wide_ptrs = wide_s_ptr + start + offsets
    if chunk > 0:
        wait_for(turn_ptr, chunk)
        s += tl.load(wide_ptrs, mask=exists, other=0.0)
    if chunk + 1 < k_chunks:
        tl.store(wide_ptrs, s, mask=exists)
        signal(turn_ptr)
    else:
        _store_rounded(s, s_ptr, block, l_tile, m, width, SPLIT, LARGEST, BLOCK_M, BLOCK_L)
        signal(ready_ptr + panel)


@triton.jit
def _product_item(
    x_ptr, s_ptr, mask_ptr, y_ptr, h_ptr, sums_ptr, energy_ptr, trace_ptr, ready_ptr, turns_ptr,
    panel, item, m, k, width, out_width, stride_xm, stride_xk,
    panels, panel_rows, panel_tiles, m_chunk, m_chunks, energies, limit,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, STEP_M: tl.constexpr,
):  # fmt: skip
    """A tile of [x ∣ S]ᵀ S over one chunk of a panel; the very last one adds the sum to y and h."""
    l_tiles = tl.cdiv(width, BLOCK_L)
    tiles = tl.cdiv(k, BLOCK_K) + tl.cdiv(out_width, BLOCK_K)
    chunk = item // (tiles * l_tiles)
    tile = item // l_tiles % tiles
    l_tile = item % l_tiles
    row_start = panel * panel_rows + chunk * m_chunk
    row_stop = tl.minimum(tl.minimum(m, (panel + 1) * panel_rows), row_start + m_chunk)
    wait_for(ready_ptr + panel, panel_tiles)
    product = _product(
        x_ptr, s_ptr, mask_ptr, tile, l_tile, row_start, row_stop, m, k, width,
        stride_xm, stride_xk, PLANES, PRECISION, BLOCK_K, BLOCK_L, STEP_M,
    )  # fmt: skip
    turn = panel * m_chunks + chunk
    turn_ptr = turns_ptr + tile * l_tiles + l_tile
    start, offsets, exists = _locate(tile, l_tile, k, out_width, BLOCK_K, BLOCK_L)
    sum_ptrs = sums_ptr + start + offsets
    if turn > 0:
        wait_for(turn_ptr, turn)
        product += tl.load(sum_ptrs, mask=exists, other=0.0)
    if turn + 1 < panels * m_chunks:
        tl.store(sum_ptrs, product, mask=exists)
        signal(turn_ptr)
    else:
        # Its turn came after the products of every panel, hence after every energy.
        trace = _sum_energies(energy_ptr, energies)
        if tile + l_tile == 0:
            tl.store(trace_ptr, trace)
        if trace < limit:
            _add_to_state(product, y_ptr, h_ptr, tile, l_tile, k, out_width, BLOCK_K, BLOCK_L)


@triton.jit
def _project(
    x_ptr, omega_ptr, mask_ptr, energy_ptr, block, l_tile, k_start, k_stop, m, width,
    stride_xm, stride_xk, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, STEP_K: tl.constexpr,
):  # fmt: skip
    """x Ω of one tile over some of K; the programs of the first columns store ‖x‖² as well."""
    if l_tile == 0:
        s, energy = _project_with_energy(
            x_ptr, omega_ptr, mask_ptr, block, l_tile, k_start, k_stop, m, width,
            stride_xm, stride_xk, True, PRECISION, BLOCK_M, BLOCK_L, STEP_K,
        )  # fmt: skip
        tl.store(energy_ptr, tl.sum(energy))
    else:
        s, energy = _project_with_energy(
            x_ptr, omega_ptr, mask_ptr, block, l_tile, k_start, k_stop, m, width,
            stride_xm, stride_xk, False, PRECISION, BLOCK_M, BLOCK_L, STEP_K,
        )  # fmt: skip
    return s


@triton.jit
def _project_with_energy(
    x_ptr, omega_ptr, mask_ptr, block, l_tile, k_start, k_stop, m, width,
    stride_xm, stride_xk, ENERGY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, STEP_K: tl.constexpr,
):  # fmt: skip
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = _kept(mask_ptr, rows, m)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    columns = l_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    exists = columns < width
    s = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    energy = tl.zeros([BLOCK_M], tl.float64)
    for start in range(k_start, k_stop, STEP_K):
        features = (start + tl.arange(0, STEP_K)).to(tl.int64)
        inside = features < k_stop
        x = tl.load(
            x_ptrs + features[None, :] * stride_xk, mask=keep[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_M, STEP_K]
        omega = tl.load(
            omega_ptr + features[:, None] * width + columns[None, :],
            mask=inside[:, None] & exists[None, :],
            other=0.0,
        )  # [STEP_K, BLOCK_L]
        s = tl.dot(x, omega, s, input_precision=PRECISION)
        if ENERGY:
            wide = x.to(tl.float32)
            # fp32 over one step, where its error is 1e-8 and has no sign, fp64 from there.
            energy += tl.sum(wide * wide, axis=1).to(tl.float64)
    return s, energy


@triton.jit
def _store_rounded(
    s, s_ptr, block, l_tile, m, width, SPLIT: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """S in its dtype; with SPLIT the rounded rest as a second plane."""
    start, offsets, exists = _locate_s(block, l_tile, m, width, BLOCK_M, BLOCK_L)
    s_ptrs = s_ptr + start + offsets
    s = tl.minimum(tl.maximum(s, -LARGEST), LARGEST)
    high = s.to(s_ptr.dtype.element_ty)
    tl.store(s_ptrs, high, mask=exists)
    if SPLIT:
        low = (s - high.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptrs + m.to(tl.int64) * width, low, mask=exists)


@triton.jit
def _product(
    x_ptr, s_ptr, mask_ptr, tile, l_tile, row_start, row_stop, m, k, width, stride_xm, stride_xk,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, STEP_M: tl.constexpr,
):  # fmt: skip
    """A tile of [x ∣ S]ᵀ S over some rows; S is the sum of its planes in both factors."""
    # One loop with the left factor chosen by pointer: two loops would double the shared memory.
    y_tiles = tl.cdiv(k, BLOCK_K)
    in_y = tile < y_tiles
    a_ptr = tl.where(in_y, x_ptr, s_ptr)
    a_width = tl.where(in_y, k, width)
    stride_am = tl.where(in_y, stride_xm, width)
    # Stays a constant where x's columns are adjacent, as those of S are.
    stride_ac = stride_xk if stride_xk == 1 else tl.where(in_y, stride_xk, 1)
    a_columns = (tl.where(in_y, tile, tile - y_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)).to(
        tl.int64
    )
    product = tl.zeros([BLOCK_K, BLOCK_L], tl.float32)
    if PLANES == 1:
        return _add_product(
            product, a_ptr, s_ptr, mask_ptr, a_columns, l_tile, row_start, row_stop,
            a_width, width, stride_am, stride_ac, PRECISION, BLOCK_L, STEP_M,
        )  # fmt: skip
    plane = m.to(tl.int64) * width
    for pair in range(tl.where(in_y, PLANES, PLANES * PLANES)):
        product = _add_product(
            product, a_ptr + pair // PLANES * plane, s_ptr + pair % PLANES * plane, mask_ptr,
            a_columns, l_tile, row_start, row_stop,
            a_width, width, stride_am, stride_ac, PRECISION, BLOCK_L, STEP_M,
        )  # fmt: skip
    return product


@triton.jit
def _add_product(
    product, a_ptr, b_ptr, mask_ptr, a_columns, b_tile, row_start, row_stop, a_width, b_width,
    stride_am, stride_ac, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, STEP_M: tl.constexpr,
):  # fmt: skip
    """product + aᵀ b; rows that the mask leaves out are not read, they may hold NaN."""
    b_columns = b_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    for start in range(row_start, row_stop, STEP_M):
        rows = start + tl.arange(0, STEP_M)
        keep = _kept(mask_ptr, rows, row_stop)
        rows = rows.to(tl.int64)
        # Loaded as aᵀ: a tl.trans is not pipelined on sm_80.
        a = tl.load(
            a_ptr + a_columns[:, None] * stride_ac + rows[None, :] * stride_am,
            mask=(a_columns < a_width)[:, None] & keep[None, :],
            other=0.0,
        )  # [BLOCK_A, STEP_M]
        b = tl.load(
            b_ptr + rows[:, None] * b_width + b_columns[None, :],
            mask=keep[:, None] & (b_columns < b_width)[None, :],
            other=0.0,
        )  # [STEP_M, BLOCK_B]
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def _kept(mask_ptr, rows, stop):
    keep = rows < stop
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _sum_energies(energy_ptr, count):
    """Σ of `count` fp64 numbers, in an order that depends on nothing else."""
    total = tl.zeros([256], tl.float64)
    for start in range(0, count, 256):
        offsets = start + tl.arange(0, 256)
        total += tl.load(energy_ptr + offsets, mask=offsets < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _locate_s(block, l_tile, m, width, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """Where a tile of S starts, its offsets from there, and which of its elements exist.

    Offsets within a tile take 32 bits: in 64 they would not fit the registers.
    """
    rows = tl.arange(0, BLOCK_M)
    columns = l_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    exists = (block * BLOCK_M + rows < m)[:, None] & (columns < width)[None, :]
    start = tl.cast(block, tl.int64) * BLOCK_M * width
    return start, rows[:, None] * width + columns[None, :], exists


@triton.jit
def _locate(tile, l_tile, k, out_width, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr):
    """The same for a tile of a contiguous [Y ; H], [K + L, L]."""
    y_tiles = tl.cdiv(k, BLOCK_K)
    in_y = tile < y_tiles
    row = tl.where(in_y, tile, tile - y_tiles) * BLOCK_K
    rows = tl.arange(0, BLOCK_K)
    columns = l_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    exists = (row + rows < tl.where(in_y, k, out_width))[:, None] & (columns < out_width)[None, :]
    start = tl.where(in_y, row, row + k).to(tl.int64) * out_width
    return start, rows[:, None] * out_width + columns[None, :], exists


@triton.jit
def _add_to_state(
    product, y_ptr, h_ptr, tile, l_tile, k, out_width,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    start, offsets, exists = _locate(tile, l_tile, k, out_width, BLOCK_K, BLOCK_L)
    in_y = tile < tl.cdiv(k, BLOCK_K)
    state_ptr = tl.where(in_y, y_ptr, h_ptr)
    start = tl.where(in_y, start, start - tl.cast(k, tl.int64) * out_width)
    state_ptrs = state_ptr + start + offsets
    tl.store(state_ptrs, tl.load(state_ptrs, mask=exists) + product, mask=exists)
