"""What verify found: checks, comparisons of two models on known answers, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One question that verify answered, and the evidence."""

    name: str
    passed: bool
    detail: str


@dataclass
class Comparison:
    """How the second model differs from the first on the answer tokens of one split."""

    pair: str
    split: str
    questions: int = 0
    tokens: int = 0
    logits_max_diff: float = 0.0
    logits_max: float = 0.0
    kl: float = 0.0
    next_token_changes: int = 0
    prob_first: float = 0.0
    prob_second: float = 0.0

    def add(self, first_TV: Tensor, second_TV: Tensor, targets_T: Tensor) -> None:
        """Take in one answer's logits; kl is a mean over tokens, probabilities over questions."""
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (first_TV, second_TV))
        count = len(targets_T)
        # Rounding can take a KL of zero below it.
        kl_sum = max((log_p.exp() * (log_p - log_q)).sum().item(), 0.0)
        self.kl = (self.kl * self.tokens + kl_sum) / (self.tokens + count)
        self.tokens += count
        difference = (first_TV.float() - second_TV.float()).abs().max().item()
        self.logits_max_diff = max(self.logits_max_diff, difference)
        self.logits_max = max(self.logits_max, first_TV.abs().max().item())
        self.next_token_changes += int((first_TV.argmax(-1) != second_TV.argmax(-1)).sum())
        picked = targets_T.unsqueeze(-1)
        for name, log in (("prob_first", log_p), ("prob_second", log_q)):
            probability = log.gather(-1, picked).mean().exp().item()
            mean = (getattr(self, name) * self.questions + probability) / (self.questions + 1)
            setattr(self, name, mean)
        self.questions += 1


@dataclass
class VerifyReport:
    """What verify found; ``passed`` is true when every check passed."""

    checks: list[Check] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    answers: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def logits_max_diff(self) -> float | None:
        """Largest logit difference between base and adapter, None when not compared."""
        found = [c.logits_max_diff for c in self.comparisons if c.pair == "base → adapter"]
        return max(found, default=None)

    @property
    def kl(self) -> float | None:
        """Mean KL(base ‖ adapter) on the forget answers in nats a token, None when not compared."""
        found = [
            c.kl for c in self.comparisons if (c.pair, c.split) == ("base → adapter", "forget")
        ]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """Content for results.json."""
        return {
            "schema": 1,
            "kind": "verify",
            "passed": self.passed,
            "logits_max_diff": self.logits_max_diff,
            "kl": self.kl,
            **asdict(self),
        }

    def text(self) -> str:
        """The report for a terminal."""
        lines = [
            f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}"
            for check in self.checks
        ]
        if self.comparisons:
            lines += ["", _table(self.comparisons)]
        for row in self.answers:
            lines += ["", f"[{row['split']}] {row['question']}"]
            lines += [
                f"  {name:8s} {text}"
                for name, text in row.items()
                if name not in ("split", "question")
            ]
        failed = [check.name for check in self.checks if not check.passed]
        verdict = (
            "verify passed"
            if self.passed
            else f"VERIFY FAILED: {', '.join(failed) or 'nothing was checked'}"
        )
        return "\n".join([*lines, "", verdict])


def _table(rows: Sequence[Comparison]) -> str:
    lines = [
        f"{'compared':18s}{'split':8s}{'max |Δlogit|':>14s}{'KL, nats':>12s}"
        f"{'next token changed':>20s}{'p(answer)':>22s}"
    ]
    for row in rows:
        changed = f"{row.next_token_changes} of {row.tokens}"
        probability = f"{row.prob_first:.3g} → {row.prob_second:.3g}"
        lines.append(
            f"{row.pair:18s}{row.split:8s}{row.logits_max_diff:14.4g}{row.kl:12.3g}{changed:>20s}{probability:>22s}"
        )
    return "\n".join(lines)
