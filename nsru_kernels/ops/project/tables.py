"""The int64 tables of the grouped kernel: problems, addresses of rows, order of items.

A training step projects the same adapters as the one before it, so what a launch needs on the
device is kept; only the addresses of rows are sent anew.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsru_kernels.dispatch.launch import capturing

FIELDS = 11  # numbers that describe a problem; ``describe`` lays them out
# Bytes of bases between the two uses of a basis: more than what all programs have under way at a
# time (64 KiB each), and with the longest basis of an 8B model still less than L2. Not measured: on
# A100 and H100 what all multiprocessors read may find but half of it.
LAG = 24 << 20
_MOST_KEPT = 16

Write = Callable[[Tensor, torch.device], Tensor]


class Kind(NamedTuple):
    """Properties that the problems of one launch share."""

    adapter_dtype: torch.dtype
    basis_dtype: torch.dtype
    output_dtype: torch.dtype
    has_gram_inverse: bool
    is_aligned: bool


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


class Problem(NamedTuple):
    """A basis, and the adapters that it is removed from."""

    basis: Tensor  # [K, Q]
    gram_inverse: Tensor | None  # [Q, Q]
    adapters: list[int]  # positions in the call
    rows: int

    @property
    def size(self) -> Size:
        K, Q = self.basis.shape
        return Size(K, Q, self.rows, self.gram_inverse is not None, self.basis.element_size())


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


class Launch(NamedTuple):
    """The part of a launch that stays while bases, sizes and strides do."""

    kind: Kind
    adapters: list[int]  # positions in the call, those of a problem next to each other
    problems: Tensor  # int64 [problems, FIELDS], on the device
    items: Tensor  # int64, on the device; behind them there may be padding
    item_count: int
    rows: int
    workspace_size: int
    counter_size: int


class Arguments(NamedTuple):
    """Arguments of a launch that each call makes anew."""

    rows: Tensor  # int64: addresses of adapter rows, then of output rows
    workspace: Tensor
    counters: Tensor


_kept: OrderedDict[tuple, list[Launch]] = OrderedDict()


def launches(
    as_RK: Sequence[Tensor],
    bases_KQ: Sequence[Tensor],
    gram_inverses_QQ: Sequence[Tensor | None],
    outputs_RK: Sequence[Tensor],
    tiles: Tiles,
    write: Write,
) -> list[Launch]:
    """The launches that fill the outputs: one for each triple of dtypes, and a second one where a
    few problems are not aligned to 16 bytes and would slow down the others.

    Rows of adapters and outputs are contiguous, gram inverses too, and nothing is empty.
    """
    device = bases_KQ[0].device
    aligned_rows = not any(t.data_ptr() % 16 for t in (*as_RK, *outputs_RK))
    key = (
        *(device, tiles, aligned_rows),
        tuple([(a.dtype, a.shape, a.stride(0)) for a in as_RK]),
        tuple([(u.data_ptr(), u.dtype, u.shape, u.stride()) for u in bases_KQ]),
        tuple([None if c is None else c.data_ptr() for c in gram_inverses_QQ]),
        tuple([(o.dtype, o.stride(0)) for o in outputs_RK]),
    )
    if device.type == "cuda":  # what is made on one stream is not awaited by others
        key = (*key, torch.cuda.current_stream(device).cuda_stream)
    if key in _kept and not capturing(device):
        _kept.move_to_end(key)
        return _kept[key]
    made = []
    for kind, problems in group(
        as_RK, bases_KQ, gram_inverses_QQ, outputs_RK, aligned_rows
    ).items():
        plan = schedule(tuple(problem.size for problem in problems), tiles, LAG)
        made.append(
            Launch(
                kind,
                [i for problem in problems for i in problem.adapters],
                to_device(describe(problems, plan), device, write),
                to_device(torch.from_numpy(plan.items), device, write),
                plan.items.size,
                sum(problem.rows for problem in problems),
                plan.workspace_size,
                plan.counter_size,
            )
        )
    if not capturing(device):  # a replay must not depend on what is kept here
        _kept[key] = made
        if len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return made


def group(
    as_RK: Sequence[Tensor],
    bases_KQ: Sequence[Tensor],
    gram_inverses_QQ: Sequence[Tensor | None],
    outputs_RK: Sequence[Tensor],
    aligned_rows: bool,
) -> dict[Kind, list[Problem]]:
    """The problems by launch: adapters that share a basis become one."""
    problems: dict[tuple, Problem] = {}
    kinds: dict[tuple, Kind] = {}
    for i, (a_RK, basis_KQ, gram_inverse_QQ, output_RK) in enumerate(
        zip(as_RK, bases_KQ, gram_inverses_QQ, outputs_RK, strict=True)
    ):
        core = None if gram_inverse_QQ is None else gram_inverse_QQ.data_ptr()
        strides = [t.stride(0) * t.element_size() for t in (a_RK, output_RK)]
        is_aligned = (
            aligned_rows
            and basis_KQ.stride(1) == 1
            and not any(
                n % 16
                for n in (*basis_KQ.shape, basis_KQ.stride(0), basis_KQ.data_ptr(), core or 0)
            )
            and not any(stride % 16 for stride in strides)
        )
        kind = Kind(
            *(a_RK.dtype, basis_KQ.dtype, output_RK.dtype),
            *(gram_inverse_QQ is not None, is_aligned),
        )
        key = (kind, basis_KQ.data_ptr(), basis_KQ.shape, basis_KQ.stride(), core)
        before = problems.get(key, Problem(basis_KQ, gram_inverse_QQ, [], 0))
        problems[key] = before._replace(
            adapters=[*before.adapters, i], rows=before.rows + a_RK.shape[0]
        )
        kinds[key] = kind
    result: dict[Kind, list[Problem]] = {}
    for key, problem in problems.items():
        result.setdefault(kinds[key], []).append(problem)
    return result


def arguments(
    launch: Launch, as_RK: Sequence[Tensor], outputs_RK: Sequence[Tensor], write: Write
) -> Arguments:
    """All that a launch needs on its device; ``write`` as in ``to_device``."""
    device = as_RK[0].device
    addresses = [
        row_addresses([tensors[i] for i in launch.adapters]) for tensors in (as_RK, outputs_RK)
    ]
    return Arguments(
        to_device(torch.from_numpy(np.concatenate(addresses)), device, write),
        torch.empty(launch.workspace_size, dtype=torch.float32, device=device),
        torch.zeros(launch.counter_size, dtype=torch.int32, device=device),
    )


def to_device(table: Tensor, device: torch.device, write: Write) -> Tensor:
    """A copy of ``table`` on ``device``.

    In a CUDA graph ``write`` makes it by kernels that get the values as arguments: a replay can
    make it again though nothing on the host has stayed.
    """
    if device.type != "cuda":
        return table.to(device)
    if capturing(device):
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


def describe(problems: Sequence[Problem], plan: Schedule) -> Tensor:
    """What the kernel reads of each problem, FIELDS numbers."""
    fields: list[int] = []
    row = 0
    for i, (basis, gram_inverse, _, rows) in enumerate(problems):
        size = problems[i].size
        fields += [
            *(basis.data_ptr(), *basis.stride()),
            0 if gram_inverse is None else gram_inverse.data_ptr(),
            *(size.K, size.Q, size.chunk, row, rows),
            *(plan.workspace_offsets[i], plan.counter_offsets[i]),
        ]
        row += rows
    return torch.tensor(fields, dtype=torch.int64, device="cpu")


def row_addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """The address of every row of every matrix, in order."""
    counts = np.array([t.shape[0] for t in tensors])
    starts = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
    strides = np.array([t.stride(0) * t.element_size() for t in tensors])
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + nth * np.repeat(strides, counts)
