"""A method of unlearning in one file, and how it is trained, projected or not.

    python examples/own_method.py --model.path MODEL [more flags of nsru train]

A method is a frozen dataclass: its fields become flags (--objective.ceiling), its `forget` is the
loss. Trainer, null space, evaluation, report and comparison ask it and know no names. `nsru` finds
it wherever Python does:

    PYTHONPATH=examples nsru train --method own_method:Ceiling --model.path MODEL …
    PYTHONPATH=examples nsru compare --methods '[own_method:Ceiling projected, npo]' …
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nsru_train.losses import Answers
from nsru_train.methods import ForgetRetain


@dataclass(frozen=True)
class Ceiling(ForgetRetain):
    """Gradient ascent that leaves a token alone once it is unlikely enough.

    Plain gradient ascent has no lower bound and ruins the model; here each token's loss ends at the
    ceiling. The retain term, and its weight w_retain, come with ForgetRetain.

    Args:
        ceiling: highest negative log-likelihood of a token to forget, in nats.
    """

    ceiling: float = 5.0

    ranges = {"ceiling": "must be positive"}  # noqa: RUF012

    def forget(self, answers: Answers) -> Tensor:
        """A scalar; answers.nll is [T], each token's negative log-likelihood."""
        return -answers.nll.clamp(max=self.ceiling).mean()


if __name__ == "__main__":
    from nsru_train.cli import main

    paris = Path(__file__).parent / "paris"
    main(
        [
            *("train", "--method=own_method:Ceiling", "--out=runs/ceiling"),
            *(f"--data.{name}={paris / name}.jsonl" for name in ("forget", "retain")),
            *("--train.steps=20", "--train.batch_size=5", "--train.lr=1e-3"),
            *sys.argv[1:],
        ]
    )
