"""The int64 tables of both grouped kernels: problems, addresses of rows, order of items."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FIELDS = 11  # numbers that describe a problem; ``describe`` lays them out
# Bytes of bases between the two uses of a basis: more than what all programs have under way at a
# time (64 KiB each), and with the longest basis of an 8B model still less than L2. Not measured: on
# A100 and H100 what all multiprocessors read may find but half of it.
LAG = 24 << 20


class Problem(NamedTuple):
    """A basis, and the adapters and outputs that it is removed from."""

    basis: Tensor  # [K, Q]
    gram_inverse: Tensor | None  # [Q, Q]
    adapters: list[Tensor]  # [R, K] each, as are the outputs
    outputs: list[Tensor]

    @property
    def size(self) -> Size:
        K, Q = self.basis.shape
        rows = sum(a.shape[0] for a in self.adapters)
        return Size(K, Q, rows, self.gram_inverse is not None, self.basis.element_size())


class Size(NamedTuple):
    """All of a problem that its items depend on."""

    K: int
    Q: int
    rows: int
    has_gram_inverse: bool
    basis_itemsize: int

    @property
    def chunk(self) -> int:
        """Channels in a part of A U: 32 parts at the most, that are summed by one program."""
        return max(256, -(-self.K // 32 // 256) * 256)


class Kind(NamedTuple):
    """Properties that the problems of one launch share."""

    adapter_dtype: torch.dtype
    basis_dtype: torch.dtype
    has_gram_inverse: bool
    is_aligned: bool


class Tiles(NamedTuple):
    """Tile sizes of a config."""

    rows: int
    out: int


class Schedule(NamedTuple):
    """The part of a launch that follows from the sizes alone."""

    items: np.ndarray  # int64
    workspace_offsets: list[int]
    workspace_size: int
    counter_offsets: list[int]
    counter_size: int


class Arguments(NamedTuple):
    """Arguments of a launch: the table, its parts, and memory."""

    table: Tensor
    problems: int
    rows: int
    items: int
    workspace: Tensor
    counters: Tensor


def group(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> tuple[list[Tensor], dict[Kind, list[Problem]]]:
    """(outputs, the problems that fill them by launch); outputs without a problem are filled.

    One launch for each pair of adapter and basis dtypes; a second one where a few problems are not
    aligned to 16 bytes and would slow down the others.
    """
    outputs: list[Tensor] = []
    problems: dict[tuple, Problem] = {}
    for a_RK, basis_KQ, gram_inverse_QQ in zip(as_RK, bases_KQ, gram_inverses_QQ, strict=True):
        if not a_RK.numel() or not basis_KQ.shape[1]:
            outputs.append(a_RK.to(torch.float32, copy=True).contiguous())
            continue
        output_RK = torch.empty(a_RK.shape, dtype=torch.float32, device=a_RK.device)
        outputs.append(output_RK)
        key = (a_RK.dtype, *_identity(basis_KQ), *_identity(gram_inverse_QQ))
        if key not in problems:
            gram_inverse_QQ = None if gram_inverse_QQ is None else gram_inverse_QQ.contiguous()
            problems[key] = Problem(basis_KQ, gram_inverse_QQ, [], [])
        problems[key].adapters.append(a_RK if a_RK.stride(1) == 1 else a_RK.contiguous())
        problems[key].outputs.append(output_RK)

    launches: dict[Kind, list[Problem]] = {}
    for problem in problems.values():
        kind = Kind(
            *(problem.adapters[0].dtype, problem.basis.dtype),
            *(problem.gram_inverse is not None, aligned(problem)),
        )
        launches.setdefault(kind, []).append(problem)
    return outputs, launches


def _identity(tensor: Tensor | None) -> tuple:
    if tensor is None:
        return (None,)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def arguments(
    problems: Sequence[Problem],
    tiles: Tiles,
    write: Callable[[Tensor, torch.device], Tensor],
    values_per_write: int,
) -> Arguments:
    """All that a launch needs on its device; ``write`` and its values as in ``to_device``."""
    device = problems[0].basis.device
    plan = schedule(tuple(problem.size for problem in problems), tiles, LAG)
    table, rows = describe(problems, plan)
    return Arguments(
        to_device(table, device, write, values_per_write),
        len(problems),
        rows,
        plan.items.size,
        torch.empty(plan.workspace_size, dtype=torch.float32, device=device),
        torch.zeros(plan.counter_size, dtype=torch.int32, device=device),
    )


def to_device(
    table: Tensor,
    device: torch.device,
    write: Callable[[Tensor, torch.device], Tensor],
    values_per_write: int,
) -> Tensor:
    """A copy of ``table`` on ``device``.

    ``write`` makes it by kernels that get the values as arguments, ``values_per_write`` a launch:
    where one launch is enough, and in a CUDA graph, which can make it again at every replay though
    nothing on the host has stayed.
    """
    if device.type != "cuda":
        return table.to(device)
    if table.numel() <= values_per_write or torch.cuda.is_current_stream_capturing():
        return write(table, device)
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def schedule(sizes: tuple[Size, ...], tiles: Tiles, lag: int) -> Schedule:
    """Items in the order of their tickets, and room for intermediate results and counters.

    Where each byte of all bases has a position in one stream, an *along* item stands at the
    position of its bytes, and a *remove* item ``lag`` bytes behind the end of its basis and as far
    from there as its bytes are from the beginning. So a remove item comes after all along items
    that it waits for, most of which are done by then, and finds its bytes in L2 if the lag fits.
    """
    keys, items = [], []
    workspace_offsets, counter_offsets = [], []
    position, workspace, counters = 0, 0, 1  # counter 0 is the ticket
    for i, size in enumerate(sizes):
        blocks, q_tiles, chunks = (
            -(-size.rows // tiles.rows),
            -(-size.Q // tiles.out),
            -(-size.K // size.chunk),
        )
        along, remove = blocks * q_tiles * chunks, blocks * -(-size.K // tiles.out)
        length = size.K * size.Q * size.basis_itemsize
        keys.append(position + np.arange(along) * (length / along))
        behind = position + length + lag
        keys.append(behind + np.arange(remove) * (length / remove))
        items.append((i << 32) + np.arange(along + remove))
        position += length
        workspace_offsets.append(workspace)
        workspace += (chunks + 1 + size.has_gram_inverse) * size.rows * q_tiles * tiles.out
        counter_offsets.append(counters)
        counters += blocks * (1 + q_tiles)
    order = np.argsort(np.concatenate(keys), kind="stable")
    return Schedule(
        np.concatenate(items)[order], workspace_offsets, workspace, counter_offsets, counters
    )


def describe(problems: Sequence[Problem], plan: Schedule) -> tuple[Tensor, int]:
    """(table, number of rows): problems, addresses of adapter rows, of output rows, items."""
    fields, row = [], 0
    for i, problem in enumerate(problems):
        basis, gram_inverse, size = problem.basis, problem.gram_inverse, problem.size
        fields += [
            *(
                basis.data_ptr(),
                *basis.stride(),
                0 if gram_inverse is None else gram_inverse.data_ptr(),
            ),
            *(size.K, size.Q, size.chunk, row, size.rows),
            *(plan.workspace_offsets[i], plan.counter_offsets[i]),
        ]
        row += size.rows
    inputs = row_addresses([a for problem in problems for a in problem.adapters])
    outputs = row_addresses([o for problem in problems for o in problem.outputs])
    parts = np.array(fields, dtype=np.int64), inputs, outputs, plan.items
    return torch.from_numpy(np.concatenate(parts)), row


def row_addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """The address of every row of every matrix, in order."""
    counts = np.array([t.shape[0] for t in tensors])
    starts = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
    strides = np.array([t.stride(0) * t.element_size() for t in tensors])
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + nth * np.repeat(strides, counts)


def aligned(problem: Problem) -> bool:
    """True where 16-byte accesses serve all of a problem."""
    basis, gram_inverse = problem.basis, problem.gram_inverse
    sizes = (*basis.shape, basis.stride(0))
    addresses = [basis.data_ptr(), 0 if gram_inverse is None else gram_inverse.data_ptr()]
    for tensor in (*problem.adapters, *problem.outputs):
        addresses += [tensor.data_ptr(), tensor.stride(0) * tensor.element_size()]
    return basis.stride(1) == 1 and not any(n % 16 for n in (*sizes, *addresses))
