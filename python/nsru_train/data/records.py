"""Question-answer records, and checks of sets of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAFE_PARTS = ("acknowledge", "decline", "redirect")
UNSEEN = ("retain_unseen", "retain_untouched", "holdout")  # what no loss has seen, by set
# Typographic quotation marks as keyboards have them.
_QUOTES = str.maketrans("‘’‚‛′“”„«»", "'''''" + '"' * 5)


@dataclass(frozen=True)
class QA:
    """One question with its answer and, where known, what evaluation and unlearning need.

    Args:
        question: non-empty text.
        answer: non-empty text, without what ends a turn.
        paraphrased_question: the same question in other words.
        paraphrased_answer: the same answer in other words.
        perturbed_answers: wrong answers in the form of the (paraphrased) answer.
        safe_target: the response wanted instead, as text or as parts (see `SafeTargets`).
        topic: what the question is about, such as an author's name.
        alternatives: plausible other answers, which some methods teach instead.
        domain: the part of the knowledge that it belongs to, which some methods unlearn apart.

    Raises:
        ValueError: empty or non-text content, or unknown parts in safe_target.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    safe_target: str | Mapping[str, str] | None = None
    topic: str | None = None
    alternatives: tuple[str, ...] = ()
    domain: str | None = None

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            check_text(name, getattr(self, name))
        for name in ("paraphrased_question", "paraphrased_answer", "topic", "domain"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name in ("perturbed_answers", "alternatives"):
            others = getattr(self, name)
            if isinstance(others, str):
                others = (others,)
            if not isinstance(others, Sequence):
                raise ValueError(f"{name} must be a list of texts, got {others!r}")
            right = {self.answer.strip()}
            if name == "perturbed_answers":
                right.add((self.paraphrased_answer or "").strip())
            for text in others:
                check_text(name, text)
                if text.strip() in right:
                    raise ValueError(f"{name} hold the answer itself, {text!r:.60}")
            object.__setattr__(self, name, tuple(others))
        if isinstance(self.safe_target, Mapping):
            check_parts("safe_target", self.safe_target)
            for part, text in self.safe_target.items():
                if text != "":  # drops the part
                    check_text(f"safe_target part {part!r}", text)
        elif self.safe_target is not None:
            check_text("safe_target", self.safe_target)
            if normalise(self.safe_target) == normalise(self.answer):
                raise ValueError(f"safe_target is the answer itself, {self.safe_target!r:.60}")


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not normalise(value):
        raise ValueError(f"{name} must be non-empty text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a surrogate pair at character {error.start}, got {value!r:.60}"
        ) from None


def check_parts(name: str, parts: Mapping[str, Any]) -> None:
    """Raise ValueError unless every key is one of SAFE_PARTS."""
    unknown = sorted(set(parts) - set(SAFE_PARTS), key=str)
    if unknown:
        raise ValueError(f"{name}: unknown parts {unknown}; known parts: {', '.join(SAFE_PARTS)}")


def normalise(text: str) -> str:
    """The text as a reader sees it: composed, case-folded, with runs of white space as one space.

    Marks that have no width, such as soft hyphens, are left out.
    """
    composed = unicodedata.normalize("NFC", text).casefold()
    seen = "".join(c for c in composed if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFC", seen).split())


def check_disjoint(
    forget: Sequence[QA], retain: Sequence[QA], more: Mapping[str, Sequence[QA]] | None = None
) -> None:
    """Raise ValueError when a set is empty or a question stands in two that must not share any.

    Questions are compared without regard to case, white space, the ways in which Unicode writes
    the same character, the form of quotation marks, and punctuation at either end. The same
    question with the same answer in both sets would be trained towards and away from at once.

    Args:
        more: sets for evaluation by name. None may share with forget, and those that stand for
            questions not trained on, `UNSEEN`, with retain neither.
    """
    for name, records in (("forget", forget), ("retain", retain)):
        if not records:
            raise ValueError(f"{name} set is empty; at least one question is needed")
    more = more or {}
    _check_apart("forget", forget, {"retain": retain, **more})
    _check_apart("retain", retain, {name: more[name] for name in UNSEEN if name in more})


def _check_apart(name: str, records: Sequence[QA], others: Mapping[str, Sequence[QA]]) -> None:
    for other, found in others.items():
        if shared := shared_questions(records, found):
            shown = "; ".join(repr(q) for q in shared[:3]) + ("; …" if len(shared) > 3 else "")
            raise ValueError(
                f"{name} and {other} sets share {len(shared)} of {len(records)} {name} questions: "
                f"{shown}. Remove them from one of the two"
            )


def shared_questions(records: Sequence[QA], others: Sequence[QA]) -> list[str]:
    """Questions of records that stand among the others too, maybe in other spelling."""
    known = {_as_asked(qa.question) for qa in others}
    return [qa.question for qa in records if _as_asked(qa.question) in known]


def repeated_questions(records: Sequence[QA]) -> list[str]:
    """Questions that an earlier record has, maybe in other spelling."""
    firsts = {_as_asked(qa.question): i for i, qa in reversed([*enumerate(records)])}
    return [qa.question for i, qa in enumerate(records) if firsts[_as_asked(qa.question)] < i]


def _as_asked(question: str) -> str:
    """`normalise` of it, where two exports of one file can still differ in marks."""
    plain = unicodedata.normalize("NFKC", question).translate(_QUOTES)
    return normalise(plain).strip(" ?!.¿¡'\"") or question


def tofu_authors(records: Sequence[QA], per_author: int = 20) -> list[list[QA]]:
    """Split records into consecutive runs of per_author questions: TOFU's authors, in order.

    Raises:
        ValueError: the number of records is not a multiple of per_author.
    """
    if per_author < 1 or len(records) % per_author:
        raise ValueError(
            f"{len(records)} records are no whole number of authors with per_author={per_author}"
        )
    return [list(records[i : i + per_author]) for i in range(0, len(records), per_author)]
