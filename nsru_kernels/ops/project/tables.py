"""The int64 tables of the grouped kernel: problems, addresses of rows, order of items.

A training step projects the same adapters as the one before it, so what a launch needs on the
device is kept; only the addresses of rows are sent anew.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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


class Group(NamedTuple):
    """Adapters on one basis that are written on top of each other.

    Rows of adapters and output are contiguous, the gram inverse too, and nothing is empty.
    """

    output: Tensor  # [ΣR, K]
    adapters: Sequence[Tensor]  # [R, K] each
    basis: Tensor  # [K, Q]
    gram_inverse: Tensor | None  # [Q, Q]

    @property
    def identity(self) -> tuple:
        """All but the addresses of rows."""
        output, _, basis, gram_inverse = self
        address = None if gram_inverse is None else gram_inverse.data_ptr()
        return (
            *(output.dtype, output.stride(0), address),
            *(basis.data_ptr(), basis.dtype, basis.shape, basis.stride()),
        )


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
    like: list[Tensor]  # nothing, in the dtypes of adapters, bases and outputs
    adapters: np.ndarray  # positions in the call, once for each row of the problems in order
    offsets: np.ndarray  # [2, rows], of each row from the start of its adapter, and of its output
    problems: Tensor  # int64 [problems, FIELDS], on the device
    items: Tensor  # int64, on the device; behind them there may be padding
    item_count: int
    workspace_size: int
    counter_size: int


class Arguments(NamedTuple):
    """The part that each call makes anew."""

    rows: Tensor  # int64: addresses of adapter rows, then of output rows
    workspace: Tensor
    counters: Tensor


_kept: OrderedDict[tuple, list[Launch]] = OrderedDict()


def launches(
    groups: Sequence[Group], tiles: Tiles, write: Write
) -> Iterator[tuple[Launch, Arguments]]:
    """The launches that fill the outputs: one for each triple of dtypes, and a second one where a
    few problems are not aligned to 16 bytes and would slow down the others."""
    device = groups[0].basis.device
    adapters = [a_RK for group in groups for a_RK in group.adapters]
    counts = [len(group.adapters) for group in groups]
    starts = np.array(
        [
            [a_RK.data_ptr() for a_RK in adapters],
            np.repeat([group.output.data_ptr() for group in groups], counts),
        ]
    )
    aligned_rows = not (starts % 16).any()
    # What is made on one stream is not awaited by others.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (
        *(device, stream, tiles, aligned_rows, tuple(counts)),
        tuple([group.identity for group in groups]),
        tuple([(a_RK.dtype, a_RK.shape, a_RK.stride(0)) for a_RK in adapters]),
    )
    keep = not capturing(device)  # a replay must not depend on what is kept here
    made = _kept.pop(key, None) if keep else None
    if made is None:
        made = make_launches(groups, aligned_rows, tiles, write)
    if keep:
        _kept[key] = made
        if len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    for launch in made:
        rows = torch.from_numpy((starts[:, launch.adapters] + launch.offsets).ravel())
        yield (
            launch,
            Arguments(
                to_device(rows, device, write),
                torch.empty(launch.workspace_size, dtype=torch.float32, device=device),
                torch.zeros(launch.counter_size, dtype=torch.int32, device=device),
            ),
        )


def make_launches(
    groups: Sequence[Group], aligned_rows: bool, tiles: Tiles, write: Write
) -> list[Launch]:
    device = groups[0].basis.device
    counts, first_rows, steps = [], [], []
    for output_RK, adapters, *_ in groups:
        first = 0
        for a_RK in adapters:
            counts.append(a_RK.shape[0])
            first_rows.append(first * output_RK.stride(0) * output_RK.element_size())
            steps.append([t.stride(0) * t.element_size() for t in (a_RK, output_RK)])
            first += a_RK.shape[0]
    made = []
    for kind, problems in sort(groups, aligned_rows).items():
        plan = schedule(tuple(problem.size for problem in problems), tiles, LAG)
        order = [i for problem in problems for i in problem.adapters]
        of_row = np.repeat(order, [counts[i] for i in order])
        nth = np.concatenate([np.arange(counts[i]) for i in order])
        offsets = nth * np.array(steps)[of_row].T
        offsets[1] += np.array(first_rows)[of_row]
        like = [torch.empty(0, dtype=dtype, device=device) for dtype in kind[:3]]
        made.append(
            Launch(
                *(kind, like, of_row, offsets),
                to_device(describe(problems, plan), device, write),
                *(to_device(torch.from_numpy(plan.items), device, write), plan.items.size),
                *(plan.workspace_size, plan.counter_size),
            )
        )
    return made


def sort(groups: Sequence[Group], aligned_rows: bool) -> dict[Kind, list[Problem]]:
    """The problems by launch; adapters that share a basis become one, also from several groups."""
    problems: dict[tuple, Problem] = {}
    position = 0
    for group in groups:
        output_RK, adapters, basis_KQ, core_QQ = group
        addresses = basis_KQ.data_ptr(), 0 if core_QQ is None else core_QQ.data_ptr()
        aligned = (
            aligned_rows
            and basis_KQ.stride(1) == 1
            and not any(n % 16 for n in (*basis_KQ.shape, basis_KQ.stride(0), *addresses))
        )
        for a_RK in adapters:
            rows = [t.stride(0) * t.element_size() % 16 for t in (a_RK, output_RK)]
            kind = Kind(
                *(a_RK.dtype, basis_KQ.dtype, output_RK.dtype),
                *(core_QQ is not None, aligned and not any(rows)),
            )
            key = kind, *addresses, basis_KQ.shape, basis_KQ.stride()
            problem = problems.setdefault(key, Problem(basis_KQ, core_QQ, [], 0))
            problem.adapters.append(position)
            problems[key] = problem._replace(rows=problem.rows + a_RK.shape[0])
            position += 1
    result: dict[Kind, list[Problem]] = {}
    for (kind, *_), problem in problems.items():
        result.setdefault(kind, []).append(problem)
    return result


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
    """FIELDS numbers for each problem, as the kernel reads them."""
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
