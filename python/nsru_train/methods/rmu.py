"""Representation misdirection: hidden states of what is forgotten go to a random place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nsru_train.losses.batch import FORGET, RETAIN, Answers, Batch
from nsru_train.losses.hidden import decoder_layers
from nsru_train.methods.method import Compat, Method, mean

# The last linear of an MLP, as families of transformers call it.
MLP_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "w2")


@dataclass(frozen=True)
class RMU(Method):
    """‖h - c·u‖² of the answers to forget, ‖h - h_base‖² of retain answers, h a layer's states.

    Means over the hidden size, an answer's tokens, and answers. u is one random direction. Trained
    are the MLPs' last linears of the layer and the two below it; what lies above does not run.

    Args:
        w_forget: of the first.
        w_retain: of the second.
        steering: c.
        layer: whose output is steered, from 0; None is 7 in 32.
        seed: of u.
        compat: "open-unlearning" multiplies the mean sum over an answer's tokens by the mean of
            1 / their number.

    Source: Li et al. 2024, arXiv 2403.03218; c and the weights as in OpenUnlearning's
    configuration. Adapters instead of whole matrices are ours.
    """

    w_forget: float = 1.0
    w_retain: float = 1.0
    steering: float = 2.0
    layer: int | None = None
    seed: int = 0
    compat: Compat | None = None

    rows = (FORGET, RETAIN)
    parts = ("forget", "retain")
    ranges = {"steering": "must be a finite number", "seed": "must not be negative"}

    def prepare(self, model: nn.Module) -> RMU:
        return replace(self, layer=self.decoder_layer(model, self.layer, 7 / 32))

    def targets(self, model: nn.Module) -> list[str]:
        name, layers = decoder_layers(model)
        top = self.prepare(model).layer or 0
        found = [
            f"{name}.{i}.{part}"
            for i in range(max(0, top - 2), top + 1)
            for part, module in layers[i].named_modules()
            if isinstance(module, nn.Linear) and part.endswith(MLP_OUTPUTS)
        ]
        if not found:
            raise ValueError(
                f"RMU: no layer of {name} has a linear called {', '.join(MLP_OUTPUTS)}; this model "
                "family is not known to it. Take another method, such as nsru or npo."
            )
        return [re.escape(name) for name in found]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        assert self.layer is not None, "prepare(model) says which layer"
        forget, retain = batch[FORGET], batch[RETAIN]
        states_TD = forget.hidden(self.layer)
        parts = {
            "forget": self.distance(forget, states_TD, self.steering * self.direction(states_TD)),
            "retain": self.distance(
                retain, retain.hidden(self.layer), retain.hidden(self.layer, with_adapters=False)
            ),
        }
        total = self.w_forget * parts["forget"] + self.w_retain * parts["retain"]
        return {**parts, "total": total}

    def direction(self, like_TD: Tensor) -> Tensor:
        """u [D]: uniform in [0, 1), then of norm 1."""
        generator = torch.Generator().manual_seed(self.seed)
        u_D = torch.rand(like_TD.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        return (u_D / u_D.norm()).to(like_TD)

    def distance(self, answers: Answers, states_TD: Tensor, goal_TD: Tensor) -> Tensor:
        """Mean over answers of the mean squared difference over tokens and the hidden size."""
        sums_B = answers.sum((states_TD - goal_TD).square().mean(1))
        lengths_B = answers.lengths.clamp(min=1).to(sums_B)
        if self.compat is None:
            return mean(sums_B / lengths_B)
        return mean(sums_B) * mean(1 / lengths_B)
