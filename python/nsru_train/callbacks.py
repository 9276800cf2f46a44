"""The trainer's work besides steps: metrics file, gradient check, early stop, evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback

from nsru_kernels.nn.inputs import evaluating
from nsru_train.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Nats a token. Retain answers known by heart start near 0, where a ratio is only noise.
RETAIN_FLOOR = 0.1


class GradientError(RuntimeError, ValueError):
    """The adapters cannot be trained as asked for: a user's mistake, so a ValueError too."""


class MetricsCallback(TrainerCallback):
    """A row of metrics.jsonl for every log: loss parts, grad_norm, lr and seconds a step.

    Parts are means over the steps since the last row; seconds is wall time in the step itself,
    without evaluation, logging and checkpoints. Rows of steps that a resumed run does again are
    dropped first.
    """

    def __init__(self, run: RunFolder, parts: Sequence[str]) -> None:
        self.run, self.parts = run, parts
        self._seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.drop_metrics_after(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds.append(time.perf_counter() - self._started)

    def on_log(self, args, state, control, logs: Mapping[str, Any], **kwargs):
        row: dict[str, Any] = {"step": state.global_step}
        if "total" in logs:
            row |= {name: logs[name] for name in self.parts}
            row |= {"grad_norm": logs.get("grad_norm"), "lr": logs["learning_rate"]}
            if self._seconds:
                row["seconds"] = sum(self._seconds) / len(self._seconds)
                self._seconds.clear()
        row |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        if state.is_world_process_zero and len(row) > 1:
            self.run.log_metrics(row)


class LossProgressCallback(ProgressCallback):
    """Trainer's progress bar with the loss parts beside it, instead of one printed line a log."""

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self.parts = parts

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs):
        if self.training_bar is not None and logs and "total" in logs:
            self.training_bar.set_postfix({k: f"{logs[k]:.3g}" for k in self.parts if logs[k]})


class GradientCheckCallback(TrainerCallback):
    """Fail in the first steps where adapters get no gradient, or one that is not finite.

    lora_A's gradient is exactly zero as long as lora_B is, so it is looked at one step later (and
    with a learning rate that warms up from zero, at the first step at which some lora_B has moved).

    Args:
        held: says of a parameter's name whether it is not trained in this step.
    """

    def __init__(
        self,
        skip: bool = False,
        fp16: bool = False,
        held: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.fp16, self.held = fp16, held
        self._pending = [] if skip else ["first", "lora_A"]

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs):
        if not self._pending:
            return
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapters = {name: p for name, p in trainable.items() if not self.held(name)}
        late = {name: p for name, p in adapters.items() if "lora_A" in name}
        if self._pending[0] == "first":
            self._check({name: p for name, p in adapters.items() if name not in late})
        elif any(p.detach().any() for name, p in trainable.items() if "lora_B" in name):
            self._check(late)
        else:
            return
        self._pending.pop(0)

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        if not parameters:
            return
        norms = {
            name: 0.0 if p.grad is None else torch.linalg.vector_norm(p.grad.float()).item()
            for name, p in parameters.items()
        }
        # A loss scaler finds its scale by overflowing; it skips those steps itself.
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if bad and not self.fp16:
            raise GradientError(
                f"{len(bad)} of {len(norms)} adapter gradients are not finite in the first steps, "
                f"such as that of {bad[0]}. Look for NaN or inf in the weights and the retain "
                "bases, lower the learning rate, or train in bfloat16."
            )
        silent = [name for name, norm in norms.items() if norm == 0]
        if len(silent) == len(norms):
            raise GradientError(
                f"all {len(norms)} adapter gradients are zero in the first steps, such as that of "
                f"{silent[0]}: training would change nothing. See that a term with weight above 0 "
                "reaches the adapted modules, and that the rank of their retain bases is below "
                "in_features; after a first step, that the learning rate is not far too high."
            )
        if silent:
            logger.warning(
                "%d of %d adapters got no gradient in the first steps, such as %s.",
                len(silent),
                len(norms),
                silent[0],
            )


class EarlyStopCallback(TrainerCallback):
    """Stop when the retain loss, averaged over 5 logs, exceeds ratio times its first logged value.

    A start below 0.1 nats a token counts as 0.1. A loss that is not finite stops at once. The
    decision reads the trainer's log history, which checkpoints hold, so a resumed run decides the
    same.
    """

    def __init__(self, ratio: float, window: int = 5) -> None:
        if not ratio > 1:
            raise ValueError(
                f"retain_stop_ratio must be above 1, got {ratio}; None turns the early stop off."
            )
        self.ratio, self.window = ratio, window
        self.reason: str | None = None

    def on_log(self, args, state, control, logs: Mapping[str, Any], **kwargs):
        if "total" not in logs:
            return
        retain = [entry["retain"] for entry in state.log_history if "retain" in entry]
        start, recent = retain[0], retain[-self.window :]
        limit = self.ratio * max(start, RETAIN_FLOOR)
        if not math.isfinite(logs["total"]):
            self.reason = f"the loss became {logs['total']} at step {state.global_step}"
        elif sum(recent) / len(recent) > limit:
            self.reason = (
                f"the retain loss reached {sum(recent) / len(recent):.3g} nats a token at step "
                f"{state.global_step}; it started at {start:.3g} and the limit is {limit:.3g}"
            )
        else:
            return
        logger.warning("Stopped early: %s. Lower the learning rate or w_suppress.", self.reason)
        control.should_training_stop = True
        # A run resumed from this step would go past the stop; from an earlier one it stops here.
        control.should_save = False


class EvalHookCallback(TrainerCallback):
    """Call hook(step, model) -> dict before the first step, every `steps` steps and at the end.

    Training stops where `stop_at` says so of the hook's results.
    """

    def __init__(
        self,
        hook: Callable[[int, nn.Module], Mapping[str, float]],
        steps: int,
        log: Callable[[dict[str, float]], None],
        stop_at: Callable[[Mapping[str, float]], bool] | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"eval_steps must be at least 1, got {steps}.")
        self.hook, self.steps, self.log, self.stop_at = hook, steps, log, stop_at

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        if state.global_step == 0:
            self._evaluate(state, model)

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs):
        if state.global_step % self.steps == 0:
            should_log = control.should_log
            results = self._evaluate(state, model)
            if self.stop_at is not None and self.stop_at(results):
                control.should_training_stop = True
            control.should_log = should_log  # else the step's own log would count as done

    def on_train_end(self, args, state, control, model: nn.Module, **kwargs):
        if state.global_step not in (entry["step"] for entry in evaluations(state.log_history)):
            self._evaluate(state, model)

    def _evaluate(self, state, model: nn.Module) -> Mapping[str, float]:
        with evaluating(model):
            results = self.hook(state.global_step, model)
        try:
            results = {name: float(value) for name, value in results.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TypeError(f"on_eval must return names and floats, got {results!r:.80}") from error
        self.log({f"eval_{name}": value for name, value in results.items()})
        return results


def evaluations(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of the hook at each step, from a trainer's log history."""
    return [
        {
            "step": entry["step"],
            **{k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")},
        }
        for entry in log_history
        if any(name.startswith("eval_") for name in entry)
    ]
