"""Training items: each forget question with its safe target and some retain questions."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nsru_train.config import TrainConfig
from nsru_train.data.encode import Encoded, collate, encode_qa
from nsru_train.data.records import QA
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.losses.batch import FORGET, RETAIN, SAFE
from nsru_train.methods import Method


@dataclass(frozen=True)
class Row:
    """One sequence of a batch."""

    encoded: Encoded
    kind: int
    ref_nll: float = 0.0
    domain: int = -1


class UnlearnDataset(Dataset):
    """Items [safe row, forget row, retain rows…], each a function of (seed, epoch, index) alone.

    An epoch passes once over the forget questions in a new order. Retain questions are dealt from
    shuffled rounds, so that all of them are seen before one is seen twice. A pair (epoch, index)
    asks for an item of any epoch, which a worker process with a copy of its own needs.

    Args:
        safe: for each forget question one sequence or more, which are taken in turn by epoch.
        forget: one sequence for each forget question, in the same order.
        retain: sequences to keep.
        ref_nll: NLL of each forget sequence with adapters off, summed over the answer and EOS.
        ref_safe: the same of each safe sequence, for methods that read it.
        kinds: of the rows in an item; the method's ``rows``.
        alternatives: whether safe rows hold records' alternatives; the method's ``alternatives``.
        retain_per_forget: retain rows in an item.
        seed: of the orders.
        domains: number of each forget question's domain, for methods that part them.

    Raises:
        ValueError: an empty set, or lengths that do not match.
    """

    def __init__(
        self,
        safe: Sequence[Sequence[Encoded]],
        forget: Sequence[Encoded],
        retain: Sequence[Encoded],
        ref_nll: Sequence[float],
        *,
        ref_safe: Sequence[Sequence[float]] | None = None,
        kinds: Collection[int] = (SAFE, FORGET, RETAIN),
        alternatives: bool = False,
        retain_per_forget: int = TrainConfig.retain_per_forget,
        seed: int = 0,
        domains: Sequence[int] | None = None,
    ) -> None:
        for name, part in (("forget", forget), ("retain", retain)):
            if not part:
                raise ValueError(
                    f"UnlearnDataset: {name} set is empty; give at least one question."
                )
        if not len(safe) == len(forget) == len(ref_nll):
            raise ValueError(
                "UnlearnDataset: safe, forget and ref_nll must have one entry for each forget "
                f"question, got {len(safe)}, {len(forget)} and {len(ref_nll)}."
            )
        if retain_per_forget < 1:
            raise ValueError(
                f"UnlearnDataset: retain_per_forget must be at least 1, got {retain_per_forget}."
            )
        self.safe, self.forget, self.retain = safe, forget, retain
        self.ref_nll = list(ref_nll)
        self.knows_safe = ref_safe is not None
        self.ref_safe = [[0.0] * len(some) for some in safe] if ref_safe is None else ref_safe
        self.kinds, self.alternatives = kinds, alternatives
        self.retain_per_forget = retain_per_forget
        self.seed = seed
        self.domains = domains
        self.epoch = 0

    def check_for(self, method: Method) -> None:
        """Raise ValueError unless a method's loss finds here what it reads."""
        names = {SAFE: "safe", FORGET: "forget", RETAIN: "retain"}
        lacking = [f"{names[kind]} rows" for kind in method.rows if kind not in self.kinds]
        if SAFE in method.ref_nll and not self.knows_safe:
            lacking.append("the NLL of safe targets with adapters off")
        if SAFE in method.rows and method.alternatives != self.alternatives:
            lacking.append("alternatives" if method.alternatives else "safe targets")
        if lacking:
            raise ValueError(
                f"train_dataset was made for another method: {type(method).__name__} reads "
                f"{' and '.join(lacking)}, which it does not hold. Make it by prepare_dataset(..., "
                "method)."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch that starts now."""
        self.epoch = epoch

    def digests(self) -> dict[str, str]:
        """SHA-256 of each set as it is trained on, and of what orders them."""
        parts = {
            "safe targets": [some[0] if len(some) == 1 else some for some in self.safe],
            "forget set": self.forget,
            "retain set": self.retain,
            "order": [self.retain_per_forget, self.seed],
            **({} if self.domains is None else {"domains": self.domains}),
        }
        return {name: hashlib.sha256(repr(p).encode()).hexdigest() for name, p in parts.items()}

    def sequences(self) -> list[Encoded]:
        """All that the items are made of."""
        return [*itertools.chain(*self.safe), *self.forget, *self.retain]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Row]:
        epoch, index = item if isinstance(item, tuple) else (self.epoch, item)
        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = _permutation(len(self), self.seed, 0, epoch)[index]
        first = (epoch * len(self) + index) * self.retain_per_forget
        turn = epoch % len(self.safe[chosen])
        domain = -1 if self.domains is None else self.domains[chosen]
        rows = [
            Row(self.safe[chosen][turn], SAFE, self.ref_safe[chosen][turn], domain),
            Row(self.forget[chosen], FORGET, self.ref_nll[chosen], domain),
            *(Row(self.retain[i], RETAIN) for i in self._retain(first)),
        ]
        return [row for row in rows if row.kind in self.kinds]

    def _retain(self, first: int) -> Iterator[int]:
        for position in range(first, first + self.retain_per_forget):
            turn, offset = divmod(position, len(self.retain))
            yield _permutation(len(self.retain), self.seed, 1, turn)[offset]


@lru_cache(maxsize=8)
def _permutation(length: int, *seeds: int) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(length)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for a whole number of optimizer steps, in `passes` epochs.

    An epoch's last batch holds what is left of it; several processes need batches of one size, so
    there it is filled up from the epoch's beginning.

    Args:
        batch_size: questions in a batch.
        accumulate: batches of each process for one step.
        processes: that share the batches in turns.
        drop_last: leave an epoch's last questions out where they do not fill a batch.

    Raises:
        ValueError: drop_last leaves nothing.
    """

    def __init__(
        self,
        dataset: UnlearnDataset,
        batch_size: int,
        accumulate: int = 1,
        processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        together = batch_size * processes
        turns = len(dataset) // together if drop_last else math.ceil(len(dataset) / together)
        if turns == 0:
            raise ValueError(
                f"drop_last leaves no batch of {together} out of {len(dataset)} forget questions; "
                "lower the batch size, or drop nothing."
            )
        self.questions = turns * together if processes > 1 or drop_last else len(dataset)
        self.passes = accumulate // math.gcd(turns, accumulate)
        self._batches = self.passes * turns * processes

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.dataset.epoch * self.passes
        for epoch in range(first, first + self.passes):
            for start in range(0, self.questions, self.batch_size):
                stop = min(start + self.batch_size, self.questions)
                yield [(epoch, i % len(self.dataset)) for i in range(start, stop)]


def make_train_dataset(
    tokenizer,
    forget: Sequence[QA],
    retain: Sequence[QA],
    safe: SafeTargets,
    ref_nll: Sequence[float],
    *,
    ref_safe: Sequence[Sequence[float]] | None = None,
    kinds: Collection[int] = (SAFE, FORGET, RETAIN),
    alternatives: bool = False,
    retain_per_forget: int = TrainConfig.retain_per_forget,
    seed: int = 0,
    max_length: int = 512,
    domains: Sequence[int] | None = None,
) -> UnlearnDataset:
    """Encode everything up front: a text that does not fit is refused before training starts.

    Args:
        ref_nll: from `reference_nll`, one for each forget question.
        ref_safe: the same for their safe targets, where the method reads it.
        kinds: of the rows in an item; the method's ``rows``.
        alternatives: take those of a record, where it has some, instead of its safe target.
        seed: of the orders. The safe target of a question is the same for every seed.
        domains: number of each forget question's domain; the method's ``domains``.

    Raises:
        ValueError: an empty set, a text longer than max_length, or lengths that do not match.
    """

    def encode(qa: QA, answer: str) -> Encoded:
        return encode_qa(tokenizer, qa.question, answer, max_length=max_length)

    return UnlearnDataset(
        safe=[[encode(qa, text) for text in taught(qa, safe, alternatives)] for qa in forget],
        forget=[encode(qa, qa.answer) for qa in forget],
        retain=[encode(qa, qa.answer) for qa in retain],
        ref_nll=ref_nll,
        ref_safe=ref_safe,
        kinds=kinds,
        alternatives=alternatives,
        retain_per_forget=retain_per_forget,
        seed=seed,
        domains=domains,
    )


def taught(qa: QA, safe: SafeTargets, alternatives: bool) -> tuple[str, ...]:
    """The answers taught instead: alternatives, or the safe target."""
    return (alternatives and qa.alternatives) or (safe.target(qa),)


@dataclass(frozen=True)
class RowCollator:
    """Items to one batch, padded to its longest sequence, with kind [B] and ref_nll [B].

    Where some have a domain also domain [B], -1 where there is none.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
        rows = [row for item in items for row in item]
        batch = collate([row.encoded for row in rows], self.pad_token_id)
        batch["kind"] = torch.tensor([row.kind for row in rows])
        batch["ref_nll"] = torch.tensor([row.ref_nll for row in rows], dtype=torch.float32)
        if any(row.domain >= 0 for row in rows):
            batch["domain"] = torch.tensor([row.domain for row in rows])
        return batch
