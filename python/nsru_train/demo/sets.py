"""The demonstration's questions: groups of authors, each with its part in the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsru_train.data.records import QA, check_disjoint, repeated_questions, tofu_authors
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo.authors import author_splits
from nsru_train.sources import load_records

_HOLDOUT, _UNKNOWN = 2, 8  # authors
GENERAL = ("real_authors", "world_facts")


@dataclass(frozen=True)
class Sets:
    """The demo's questions, by author.

    Attributes:
        forget: unlearnt.
        retain: seen by the retain loss.
        retain_unseen: seen by the retain subspaces only.
        retain_untouched: seen by nothing but the evaluation.
        holdout: never trained on.
        unknown: authors about whom the base model has learnt to decline, as instruction-tuned
            models have; the answers are safe targets.
        general: real_authors and world_facts, where the model is one that knows the world.
    """

    forget: list[QA]
    retain: list[QA]
    retain_unseen: list[QA]
    retain_untouched: list[QA] = field(default_factory=list)
    holdout: list[QA] = field(default_factory=list)
    unknown: list[QA] = field(default_factory=list)
    general: dict[str, list[QA]] = field(default_factory=dict)

    @property
    def authors(self) -> dict[str, list[QA]]:
        """The groups of authors that have questions, by name."""
        return {k: v for k, v in vars(self).items() if v and k != "general"}

    @property
    def memorised(self) -> list[QA]:
        """The questions that the base model is trained on."""
        answered = [*self.forget, *self.retain, *self.retain_unseen, *self.retain_untouched]
        return [*answered, *self.unknown]


def fictitious_sets(authors: int, safe: SafeTargets) -> Sets:
    """Authors that exist nowhere else; see ``data.authors``."""
    splits = author_splits(authors=authors, holdout=_HOLDOUT + _UNKNOWN)
    spare = _by_topic(splits.holdout)
    return _sets(splits.forget, _by_topic(splits.retain), spare, safe)


def tofu_sets(data_dir: str, authors: int, safe: SafeTargets) -> Sets:
    """forget01's two authors and TOFU's first retain authors, paraphrased where TOFU has that."""
    forget = load_records("tofu:forget01_perturbed", data_dir)
    retain = load_records("tofu:retain99", data_dir)
    # The first rows once more, with paraphrases and wrong answers.
    richer = load_records("tofu:retain_perturbed", data_dir)
    retain = [*richer, *retain[len(richer) :]]
    spare = tofu_authors(load_records("tofu:holdout10", data_dir))[: _HOLDOUT + _UNKNOWN]
    kept = tofu_authors(retain)[: authors - 2]
    # Some questions do not say whom they are about, so that two authors have the same one.
    unclear = set(repeated_questions([qa for author in (forget, *kept, *spare) for qa in author]))
    kept = [[qa for qa in author if qa.question not in unclear] for author in kept]
    return _sets(forget, kept, spare, safe)


def target_sets(folder: str) -> Sets:
    """The questions beside a model that was made elsewhere: FOLDER/data/GROUP.jsonl.

    Raises:
        ValueError: forget, retain or retain_unseen is missing, a file is damaged, or sets share
            questions that they must not share.
    """
    files = {path.stem: path for path in sorted(Path(folder, "data").glob("*.jsonl"))}
    if missing := [n for n in ("forget", "retain", "retain_unseen") if n not in files]:
        raise ValueError(
            f"model: {folder}/data has no {missing[0]}.jsonl; give a folder that `make smollm2` "
            "made, or put your own questions there."
        )
    groups = {name: load_records(path) for name, path in files.items()}
    general = {name: groups.pop(name) for name in GENERAL if name in groups}
    if unknown := sorted(groups.keys() - Sets.__dataclass_fields__.keys()):
        raise ValueError(f"model: {folder}/data/{unknown[0]}.jsonl is not a group of the demo.")
    more = {k: v for k, v in {**groups, **general}.items() if k not in ("forget", "retain")}
    check_disjoint(groups["forget"], groups["retain"], more)
    return Sets(**groups, general=general)


def _sets(
    forget: Sequence[QA], retain: list[list[QA]], spare: list[list[QA]], safe: SafeTargets
) -> Sets:
    """Of four retain authors two go to the loss, one to the subspaces, one to evaluation alone."""

    def flat(authors: Iterable[list[QA]]) -> list[QA]:
        return [qa for author in authors for qa in author]

    return Sets(
        forget=list(forget),
        retain=flat(retain[0::2]),
        retain_unseen=flat(retain[1::4]),
        retain_untouched=flat(retain[3::4]),
        holdout=flat(spare[:_HOLDOUT]),
        unknown=[QA(qa.question, safe.target(qa), topic=qa.topic) for qa in flat(spare[_HOLDOUT:])],
    )


def _by_topic(records: Sequence[QA]) -> list[list[QA]]:
    groups: dict[str | None, list[QA]] = {}
    for qa in records:
        groups.setdefault(qa.topic, []).append(qa)
    return list(groups.values())
