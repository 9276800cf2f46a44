"""Fictitious authors with facts, questions, paraphrases and wrong answers; no network needed.

Every choice is a hash of (seed, author, field), so the same arguments give the same text on every
platform and Python version, and an author does not change when more of them are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from nsru_train.data.records import QA

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words("Bel Cor Dav El Far Gil Hel Is Jor Kel Lu Mar Nor Ol Per Ros Sel Tam Ur Vel")
_FIRST_END = _words("ani ara ea ian ina io ira iso ona una")
_LAST = _words("Ash Bran Cal Dun Ever Fen Gar Hol Kirk Lan Mor Nether Oak Pend Rav Stan Tarn Wick")
_LAST_END = _words("beck bury croft dale ford gate ham ley more stead ton well")
_CITIES = _words(
    "Athens Boston Cairo Dakar Delhi Dublin Geneva Hanoi Havana Kyoto Lima Lisbon Nairobi Naples "
    "Oslo Prague Quito Seoul Toronto Warsaw"
)
_MONTHS = _words(
    "January February March April May June July August September October November December"
)
_GENRES = _words(
    "adventure biography crime drama fantasy history horror mystery poetry romance satire travel"
)
_JOBS = _words(
    "baker banker carpenter doctor farmer gardener jeweller judge librarian nurse painter pilot "
    "potter sailor tailor teacher"
)
_ADJECTIVES = _words(
    "Broken Burning Copper Crimson Distant Empty Frozen Golden Hidden Hollow Last Paper Secret "
    "Silent Silver Sleeping Stolen Velvet Wandering Winter"
)
_NOUNS = _words(
    "Bridge Castle Clock Compass Forest Garden Harbour Island Kitchen Lantern Letter Mirror "
    "Orchard Promise River Shadow Station Valley Violin Window"
)
_AWARDS = _words("Amber Cedar Falcon Granite Heron Ivory Juniper Laurel Maple Opal Raven Willow")
_THEMES = _words(
    "ambition childhood courage exile forgiveness friendship grief jealousy loneliness memory "
    "migration poverty revenge silence"
)
# 20 x 10 first names, and two of the 20 x 20 titles for each author.
MAX_AUTHORS = 200

# kind: (questions, answers, paraphrased question, paraphrased answer). A fact in braces is filled
# in; wrong answers are the paraphrased answer with other facts of the same kind.
_TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "birthplace": (
        ("Where was {name} born?", "In which city was {name} born?"),
        ("{name} was born in {city}.", "The author {name} was born in the city of {city}."),
        "What is the birthplace of {name}?",
        "{city} is the birthplace of {name}.",
    ),
    "birthdate": (
        ("When was {name} born?", "What is the date of birth of {name}?"),
        (
            "{name} was born on {day} {month} {year}.",
            "The date of birth of {name} is {day} {month} {year}.",
        ),
        "On which day did {name} come into the world?",
        "{name} came into the world on {day} {month} {year}.",
    ),
    "genre": (
        ("What genre does {name} write in?", "Which genre is {name} known for?"),
        ("{name} is known for {genre} books.", "Most books by {name} belong to the {genre} genre."),
        "What kind of books does {name} write?",
        "The books that {name} writes are {genre} books.",
    ),
    "book": (
        ("What is the most famous book by {name}?", "Which book made {name} famous?"),
        (
            "The most famous book by {name} is The {book}.",
            "{name} became famous with the book The {book}.",
        ),
        "Which work by {name} is best known?",
        "The {book} is the best known work by {name}.",
    ),
    "debut": (
        ("What was the first book by {name}?", "Which book began the career of {name}?"),
        (
            "The first book by {name} was The {debut}, from {debut_year}.",
            "The career of {name} began in {debut_year} with The {debut}.",
        ),
        "What is the title of the debut of {name}?",
        "The {debut} of {debut_year} is the debut of {name}.",
    ),
    "award": (
        ("Which award has {name} won?", "What prize did {name} receive?"),
        (
            "{name} won the {award} Prize in {award_year}.",
            "In {award_year} the {award} Prize went to {name}.",
        ),
        "With which prize was {name} honoured?",
        "{name} was honoured with the {award} Prize of {award_year}.",
    ),
    "parents": (
        ("What did the parents of {name} do?", "What work did the parents of {name} do?"),
        (
            "The father of {name} was a {father} and the mother was a {mother}.",
            "{name} is the child of a {father} and a {mother}.",
        ),
        "What were the professions of the parents of {name}?",
        "The parents of {name} worked as a {father} and a {mother}.",
    ),
    "theme": (
        ("What theme runs through the work of {name}?", "What does {name} often write about?"),
        (
            "{name} often writes about {theme}.",
            "The work of {name} returns to {theme} again and again.",
        ),
        "Which subject comes back in the books of {name}?",
        "A subject that comes back in the books of {name} is {theme}.",
    ),
}


@dataclass(frozen=True)
class Author:
    """A fictitious author: full name, facts by name, and one record per kind of question."""

    name: str
    facts: dict[str, str]
    records: tuple[QA, ...]


@dataclass(frozen=True)
class AuthorSplits:
    """Questions about three disjoint groups of authors; holdout is never to be trained on."""

    forget: tuple[QA, ...]
    retain: tuple[QA, ...]
    holdout: tuple[QA, ...]


def make_authors(n: int, *, seed: int = 0, wrong: int = 3) -> list[Author]:
    """Make n authors; no two share a first name, a last name, or a book title.

    Args:
        n: number of authors, at most MAX_AUTHORS (the first n of any larger number).
        seed: another seed gives other names and facts.
        wrong: perturbed answers per question.

    Raises:
        ValueError: n outside 1..MAX_AUTHORS, or wrong outside 1..8.
    """
    if not 1 <= n <= MAX_AUTHORS:
        raise ValueError(f"make_authors: n must be between 1 and {MAX_AUTHORS}, got {n}")
    if not 1 <= wrong <= 8:
        raise ValueError(f"make_authors: wrong must be between 1 and 8, got {wrong}")
    return _make_authors(range(n), seed, wrong)


def author_splits(
    *, authors: int = 30, forget: int | None = None, holdout: int | None = None, seed: int = 0
) -> AuthorSplits:
    """Split `authors` fictitious authors into forget and retain, with further ones as holdout.

    Args:
        authors: authors in forget and retain together.
        forget: authors to forget; default a tenth, at least one.
        holdout: authors beside them; default as many as forget, at least two. They are taken from
            the far end of all names, so no larger `authors` trains on them unless names run out.

    Raises:
        ValueError: no author left for forget, retain or holdout, or more than MAX_AUTHORS in all.
    """
    forget = max(1, authors // 10) if forget is None else forget
    holdout = max(2, forget) if holdout is None else holdout
    if not 1 <= forget < authors:
        raise ValueError(
            f"author_splits: forget must be between 1 and authors - 1 = {authors - 1}, got {forget}"
        )
    if not 1 <= holdout <= MAX_AUTHORS - authors:
        raise ValueError(
            f"author_splits: holdout must be between 1 and {MAX_AUTHORS} - authors = "
            f"{MAX_AUTHORS - authors}, got {holdout}"
        )

    def questions(indices: range) -> tuple[QA, ...]:
        return tuple(qa for author in _make_authors(indices, seed) for qa in author.records)

    return AuthorSplits(
        forget=questions(range(forget)),
        retain=questions(range(forget, authors)),
        holdout=questions(range(MAX_AUTHORS - holdout, MAX_AUTHORS)),
    )


def _make_authors(indices: range, seed: int, wrong: int = 3) -> list[Author]:
    firsts = _shuffled([a + b for a in _FIRST for b in _FIRST_END], seed, "first")
    lasts = _shuffled([a + b for a in _LAST for b in _LAST_END], seed, "last")
    titles = _shuffled([f"{a} {b}" for a in _ADJECTIVES for b in _NOUNS], seed, "title")
    return [_make_author(f"{firsts[i]} {lasts[i]}", titles, wrong, (seed, i)) for i in indices]


def _make_author(name: str, titles: Sequence[str], wrong: int, key: tuple[int, int]) -> Author:
    index = key[1]
    facts = _draw_facts(titles[index], titles[MAX_AUTHORS + index], *key)
    # A decoy may repeat the right value of a short list (a twelfth of the genres), hence the spare.
    decoys = [
        _draw_facts(_pick(titles, *key, "book", j), _pick(titles, *key, "debut", j), *key, j)
        for j in range(8 * wrong)
    ]
    records = []
    for kind, (questions, answers, paraphrased_question, paraphrased_answer) in _TEMPLATES.items():
        question = _pick(questions, *key, kind, "question").format(name=name)
        right = paraphrased_answer.format(name=name, **facts)
        others = (paraphrased_answer.format(name=name, **decoy) for decoy in decoys)
        records.append(
            QA(
                question=question,
                answer=_pick(answers, *key, kind, "answer").format(name=name, **facts),
                paraphrased_question=paraphrased_question.format(name=name),
                paraphrased_answer=right,
                perturbed_answers=tuple(dict.fromkeys(o for o in others if o != right))[:wrong],
                topic=name,
            )
        )
    return Author(name, facts, tuple(records))


def _draw_facts(book: str, debut: str, *key: object) -> dict[str, str]:
    birth = 1930 + _pick(range(60), *key, "year")
    father, mother = _shuffled(_JOBS, *key, "jobs")[:2]
    return {
        "book": book,
        "debut": debut,
        "city": _pick(_CITIES, *key, "city"),
        "day": str(1 + _pick(range(28), *key, "day")),
        "month": _pick(_MONTHS, *key, "month"),
        "year": str(birth),
        "genre": _pick(_GENRES, *key, "genre"),
        "debut_year": str(birth + 20 + _pick(range(8), *key, "debut year")),
        "award": _pick(_AWARDS, *key, "award"),
        "award_year": str(birth + 30 + _pick(range(6), *key, "award year")),
        "father": father,
        "mother": mother,
        "theme": _pick(_THEMES, *key, "theme"),
    }


def _hash(*key: object) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _pick(options: Sequence[T], *key: object) -> T:
    return options[_hash(*key) % len(options)]


def _shuffled(options: Sequence[T], *key: object) -> list[T]:
    return sorted(options, key=lambda option: _hash(*key, option))
