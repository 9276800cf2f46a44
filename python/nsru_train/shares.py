"""Work that the processes of a launch share: each does its part, then all have the whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nsru_kernels.nn.inputs import is_distributed

T = TypeVar("T")
# Ranks wait for the slowest one; one that has died is seen at once.
PATIENCE = timedelta(days=7)


def from_first(value: T) -> T:
    """The first process's value, in each of a process group; the value itself where there is none.

    What is sampled can differ between devices, and all must train on the same.
    """
    if not is_distributed():
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


@dataclass(frozen=True)
class Shares:
    """This process's part of what ``world`` processes do together; alone it does all.

    Args:
        rank: of this process.
        world: number of processes.
        group: of gloo, by which they hear of each other; None for one process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def of(self, jobs: Sequence[T]) -> Sequence[T]:
        """Every ``world``-th job, from this process's own."""
        return jobs[self.rank :: self.world]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """The result of ``work`` in each process, by rank. All must call it.

        Raises:
            ChildProcessError: another rank has died or failed; the message names it.
        """
        if self.world == 1:
            return [work()]
        done, error = None, None
        try:
            done = work()
        except Exception as found:  # which the others would wait for
            error = found
        if (dead := self._dead()) is not None:
            raise error or ChildProcessError(
                f"rank {dead} of {self.world} ended before its share was done; what it printed "
                "last, or the system's log, says why."
            )
        parts: list[Any] = [None] * self.world
        said = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(parts, (done, said), group=self.group)
        if error is not None:
            raise error
        for rank, (_, said) in enumerate(parts):
            if said is not None:
                raise ChildProcessError(f"rank {rank} of {self.world}: {said}")
        return [done for done, _ in parts]

    def _dead(self) -> int | None:
        """A rank that has died, if any; all others come here first.

        gloo's own monitored_barrier names none that died before the first rank asked.
        """
        word = torch.full((1,), -1)
        if self.rank:
            try:
                dist.send(word, 0, group=self.group)
                dist.recv(word, 0, group=self.group)
            except RuntimeError:
                return 0
            return None if word < 0 else int(word)
        alive = []
        for rank in range(1, self.world):
            try:
                dist.recv(torch.empty_like(word), rank, group=self.group)
                alive.append(rank)
            except RuntimeError:
                word.fill_(rank)
        for rank in alive:
            dist.send(word, rank, group=self.group)
        return None if word < 0 else int(word)


def launched() -> Shares:
    """The shares of the processes that torchrun or accelerate started; of one where none did.

    Raises:
        ValueError: a launcher says how many there are and not where they meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Shares()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Shares(
        dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE)
    )
