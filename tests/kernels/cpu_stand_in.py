"""A stand-in for the extension ``nsru_kernels._cpu`` where there is no AMX: the same functions with
the same arguments, multiplied by PyTorch from the addresses that Python hands over."""

import ctypes

import torch

BF16 = torch.bfloat16
interface = 3  # of csrc/cpu/bindings.cpp


def unavailable():
    return ""


def at(matrix, dtype):
    """The matrix at (address, rows, columns, row stride, column stride)."""
    address, rows, columns, row_stride, column_stride = matrix
    if not rows * columns:
        return torch.empty(rows, columns, dtype=dtype)
    size = (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(
        (rows, columns), (row_stride, column_stride)
    )


def forward(x, a, s, siblings, threads):
    """S = x Āᵀ and y = [x ∣ s S]·[W ∣ B]ᵀ + b, accumulated in float32."""
    assert threads == torch.get_num_threads()
    x, a, s = (at(matrix, BF16) for matrix in (x, a, s))
    s.copy_(x.float() @ a.float().T)
    ranks = [b[2] for _, b, *_ in siblings]
    for (w, b, scaling, bias, y), s_i in zip(siblings, s.split(ranks, dim=1), strict=True):
        w, b, y = (at(matrix, BF16) for matrix in (w, b, y))
        total = x.float() @ w.float().T + scaling * s_i.float() @ b.float().T
        y.copy_(total + at((bias, 1, y.shape[1], y.shape[1], 1), BF16).float() if bias else total)


def backward(x, a, s, ds, dx, da, siblings, threads):
    """dS where dX or dĀ is wanted; dĀ and dB in float32. Without dY, columns of dS stay."""
    assert threads == torch.get_num_threads()
    x, a, s, ds = (at(matrix, BF16) for matrix in (x, a, s, ds))
    ranks, total = [b[2] for _, b, *_ in siblings], torch.zeros(x.shape)
    columns = zip(siblings, s.split(ranks, dim=1), ds.split(ranks, dim=1), strict=True)
    for (w, b, scaling, dy, db), s_i, ds_i in columns:
        if dy is None:
            assert db is None, "dB of an output that was not used"
            continue
        w, b, dy = (at(matrix, BF16).float() for matrix in (w, b, dy))
        if dx or da:
            ds_i.copy_(scaling * dy @ b)
        if db:
            at(db, torch.float32).copy_(scaling * dy.T @ s_i.float())
        total += dy @ w
    if dx:
        at(dx, BF16).copy_(total + ds.float() @ a.float())
    if da:
        at(da, torch.float32).copy_(ds.float().T @ x.float())


def project(basis, adapters, threads):
    """Ā = A - (A U) Uᵀ of (address of A, address of Ā, rank)."""
    assert threads == torch.get_num_threads()
    u = at(basis, torch.float32)
    for source, target, rank in adapters:
        a, projected = (
            at((address, rank, u.shape[0], u.shape[0], 1), torch.float32)
            for address in (source, target)
        )
        projected.copy_(a - a @ u @ u.T)
