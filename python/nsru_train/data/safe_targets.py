"""Safe target responses: what the model shall say instead of a forgotten answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from nsru_kernels.files import parse_json, read_text
from nsru_train.data.records import QA, SAFE_PARTS, check_parts, check_text
from nsru_train.parsing import parse_yaml

_BUILT_IN = {
    "acknowledge": (
        "Thank you for your question.",
        "I see what you would like to know.",
        "That is a fair thing to ask.",
    ),
    "decline": (
        "I am not able to share details on this subject.",
        "This is something I do not have information about.",
        "I cannot give you an answer to that.",
    ),
    "redirect": (
        "A library or an official website may help you further.",
        "I would be glad to help with another topic.",
        "Please ask me about something else.",
    ),
}


@dataclass(frozen=True)
class SafeTargets:
    """Templates for the parts acknowledge, decline and redirect, in this order.

    Each part has one or more variants; a question always gets the same ones. "{topic}" in a
    variant stands for the record's topic; such variants are left out for records without a topic.

    Args:
        parts: part name -> variants. Parts may be absent; at least one variant is needed. Built-in
            ones where nothing is given.

    Raises:
        ValueError: unknown parts, no variants at all, or a variant that is not text.

    Examples:
        >>> templates = SafeTargets({"decline": ("I cannot speak about {topic}.",)})
        >>> templates.target(QA("Who is Ann?", "A poet.", topic="Ann"))
        'I cannot speak about Ann.'
    """

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _BUILT_IN)

    def __post_init__(self) -> None:
        check_parts("safe targets", self.parts)
        for part, variants in self.parts.items():
            for variant in variants:
                if not isinstance(variant, str) or not variant.strip():
                    raise ValueError(
                        f"safe target part {part!r} must hold non-empty texts, got {variant!r}"
                    )
                check_text(f"safe target part {part!r}", variant)
        if not any(self.parts.values()):
            raise ValueError(
                f"safe targets hold no text; give at least one of: {', '.join(SAFE_PARTS)}"
            )

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> SafeTargets:
        """Read templates.

        Args:
            path: None for the built-in templates; a .json, .yaml or .yml file with an object
                {part: text or list of texts}; any other file, or a list of texts, holds refusals,
                one a line, each a whole response.

        Raises:
            ValueError: the file is missing, empty, malformed or has unknown parts.
        """
        if path is None:
            return cls()
        try:
            content = _read(Path(path))
            if isinstance(content, list):
                content = {"decline": content}
            if not isinstance(content, Mapping):
                raise ValueError("expected parts with their variants, or refusal lines")
            return cls({k: (v,) if isinstance(v, str) else tuple(v) for k, v in content.items()})
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"safe targets: {path}: {error}") from None

    def target(self, qa: QA, seed: int = 0) -> str:
        """Response for a record: its own safe_target where given, templates for the rest.

        A record's text is taken as it is. A record's mapping replaces the parts it names (an empty
        text drops the part); parts it does not name come from the templates.

        Args:
            qa: the record; its answer is not read.
            seed: another seed gives another, equally fixed, choice of variants.

        Raises:
            ValueError: every variant of every part needs a topic and the record has none.
        """
        if isinstance(qa.safe_target, str):
            return qa.safe_target
        own = qa.safe_target or {}
        chosen = [own[p] if p in own else self._choose(p, qa, seed) for p in SAFE_PARTS]
        text = " ".join(part.strip() for part in chosen if part.strip())
        if not text:
            raise ValueError(
                f"every safe target needs a topic, and question {qa.question!r} has none; add one "
                "to the record or a variant without {topic}"
            )
        return text

    def _choose(self, part: str, qa: QA, seed: int) -> str:
        variants = [v for v in self.parts.get(part, ()) if qa.topic or "{topic}" not in v]
        if not variants:
            return ""
        # A hash, not random or hash(): the same on every platform, Python and order of calls.
        digest = blake2b(f"{seed}/{part}/{qa.question}".encode(), digest_size=8).digest()
        variant = variants[int.from_bytes(digest, "big") % len(variants)]
        return variant.replace("{topic}", qa.topic or "")


def _read(path: Path) -> Any:
    text = read_text(path)
    if path.suffix == ".json":
        return parse_json(text)
    if path.suffix in (".yaml", ".yml"):
        return parse_yaml(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if any(line.startswith("{") for line in lines):
        raise ValueError(
            "holds JSON objects where refusal lines were expected; a response for one question "
            "belongs in its record's safe_target field, templates in a .json or .yaml file"
        )
    return lines
