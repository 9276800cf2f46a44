"""Tasks of EleutherAI's lm-evaluation-harness, such as WMDP and MMLU, on the model in memory."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nsru_kernels.checks import check_range
from nsru_train.data.encode import TextFormat, format_of
from nsru_train.guard import guard_of, without_update
from nsru_train.language_models import is_encoder_decoder
from nsru_train.routed import RoutedLinear
from nsru_train.shares import Shares

Row = dict[str, Any]

SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class TaskSettings:
    """Tasks, and lm-eval's options of the same names; see ``nsru eval --help``.

    Raises:
        ValueError: one is out of its range, or has no effect for want of tasks.
    """

    tasks: str | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    limit: float | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, "must be ≥ 1", whole=True)
        if self.num_fewshot is not None:
            check_range("num_fewshot", self.num_fewshot, "must not be negative", whole=True)
        if self.limit is not None:
            check_range("limit", self.limit, "must be positive")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.tasks is None and given:
            raise ValueError(f"{given[0]}: has no effect without tasks; give --tasks too.")
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise ValueError(
                f"limit: expected a number of questions, or a share below 1, got {self.limit}."
            )


class Tasks:
    """Tasks of lm-eval with their data, read before any model is.

    Raises:
        ValueError: lm-eval is not installed, or a task is unknown, cannot be read, or of no use
            here.
    """

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self.names = [name.strip() for name in str(settings.tasks).split(",") if name.strip()]
        if not self.names:
            raise ValueError("tasks: expected names such as wmdp_bio,mmlu, got none.")
        if find_spec("lm_eval") is None:
            raise ValueError(
                f"tasks: {settings.tasks} needs lm-eval, which is not installed: "
                "pip install 'nsru-kernels[eval]'"
            )
        if settings.include_path is not None and not Path(settings.include_path).is_dir():
            raise ValueError(
                f"include_path: no folder {settings.include_path}; give one with tasks in YAML."
            )
        with _quiet():
            self._load()

    def _load(self) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.settings.include_path)
        for name in self.names:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks, n=1)
                raise ValueError(
                    f"tasks: lm-eval knows no {name!r}"
                    + (f"; did you mean {close[0]!r}?" if close else "")
                    + " `lm-eval ls tasks` lists all; those of your own need --include_path."
                )
        self.tasks: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}
        self.group_of: dict[str, str] = {}  # of those that were not asked for by name
        for name in self.names:
            try:
                found = manager.load([name])
            except Exception as error:  # a task's data and code may raise anything
                raise ValueError(f"tasks: {name} cannot be read: {error}") from error
            self.tasks |= found["tasks"]
            self.groups |= found.get("groups", {})
            if name in found.get("groups", {}):  # a tag has no number of its own
                inside = (found["tasks"].keys() | found["groups"].keys()) - set(self.names)
                self.group_of |= dict.fromkeys(inside, name)
        for name, task in self.tasks.items():
            task.set_fewshot_seed(seed=SEED)
            own, asked = task.get_config("num_fewshot"), self.settings.num_fewshot
            if own != 0:  # which no option changes in lm-eval
                task.set_config(key="num_fewshot", value=(own or 0) if asked is None else asked)
            for flag, what in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows images")):
                if getattr(task, flag, False):
                    raise ValueError(f"tasks: {name} {what}, which is not done here; leave it out.")

    def check_template(self, tokenizer: Any) -> None:
        """Raise ValueError where a chat template is asked for and the tokenizer has none."""
        if self.settings.apply_chat_template and not tokenizer.chat_template:
            raise ValueError(
                "apply_chat_template: the tokenizer has no chat template; leave it out."
            )

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        base: bool,
        shares: Shares = Shares(),  # noqa: B008
    ) -> list[Row]:
        """Each metric of each task, of the model as it is and, if ``base``, of its base model.

        Returns:
            Rows of "task", "metric", "questions", "after" and its "after_stderr", and "before" with
            "before_stderr". The tasks that were asked for come first; others have the "group" that
            they belong to.
        """
        found = self._pass("after", model, tokenizer, shares)
        if base:
            with without_update(model):
                before = self._pass("before", model, tokenizer, shares)
            found = {key: before[key] | row for key, row in found.items()}
        first = {name: i for i, name in enumerate(self.names)}
        return sorted(found.values(), key=lambda row: first.get(row["task"], len(first)))

    def _pass(
        self, label: str, model: Any, tokenizer: Any, shares: Shares
    ) -> dict[tuple[str, str], Row]:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import set_seed

        # Guards and routed experts have to know a prompt's end; lm-eval pads without a mask.
        told = guard_of(model) is not None or any(
            isinstance(module, RoutedLinear) for module in model.modules()
        )

        class Shared(HFLM):
            """Every process asks its share of the questions and knows all answers."""

            def _loglikelihood_tokens(self, requests, **options):
                # lm-eval scores one-token answers in one row with their question.
                rows = [tuple(context + answer[:-1]) for _, context, answer in requests]
                ask = self._one_by_one if told else super()._loglikelihood_tokens
                return shared(ask, requests, rows, **options)

            def _one_by_one(self, requests, disable_tqdm=False, **options):
                found = []
                for request in tqdm(requests, "loglikelihood", disable=disable_tqdm):
                    self._answered = len(request[2])
                    found += super()._loglikelihood_tokens([request], disable_tqdm=True, **options)
                return found

            def _model_call(self, inps, *args, **options):
                if not told:
                    return super()._model_call(inps, *args, **options)
                prompt = inps.shape[1] - self._answered + 1
                mask = (torch.arange(inps.shape[1], device=inps.device) < prompt).expand_as(inps)
                with torch.no_grad():
                    return self.model(inps, prompt_mask=mask).logits

            def generate_until(self, requests, **options):
                return shared(super().generate_until, requests, range(len(requests)), **options)

        def shared(ask: Any, requests: Any, rows: Sequence[Any], **options: Any) -> list[Any]:
            turns = {row: i % shares.world for i, row in enumerate(dict.fromkeys(rows))}
            ranks = [turns[row] for row in rows]
            own = [one for one, rank in zip(requests, ranks, strict=True) if rank == shares.rank]
            options["disable_tqdm"] = options.get("disable_tqdm", False) or shares.rank > 0
            parts = shares.gather(lambda: ask(own, **options) if own else [])
            answers = [iter(part) for part in parts]
            return [next(answers[rank]) for rank in ranks]

        set_seed(SEED)
        chat = self.settings.apply_chat_template
        asks = format_of(tokenizer) if chat else TextFormat()  # as the run's own questions
        written = {"chat_template_args": dict(asks.template_kwargs)} if asks.template_kwargs else {}
        with _quiet():
            served = Shared(
                pretrained=model,
                tokenizer=tokenizer,
                backend="seq2seq" if is_encoder_decoder(model) else "causal",
                batch_size=1 if told else self.settings.batch_size,
                **written,
            )
            found: Any = evaluate(
                served,
                {"tasks": self.tasks, "groups": self.groups},
                limit=self.settings.limit,
                log_samples=False,
                system_instruction=asks.system_prompt,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        return {
            (row["task"], row["metric"]): row
            for task, values in found["results"].items()
            for row in self._rows(label, task, values)
        }

    def _rows(self, label: str, task: str, values: Mapping[str, Any]) -> Iterator[Row]:
        for key, value in values.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            row: Row = {
                "task": task,
                "metric": metric if answer_filter == "none" else f"{metric} ({answer_filter})",
                "questions": values["sample_len"],
                label: float(value),
            }
            stderr = values.get(f"{metric}_stderr,{answer_filter}")
            if isinstance(stderr, float):
                row[f"{label}_stderr"] = float(stderr)
            if task in self.group_of:
                row["group"] = self.group_of[task]
            yield row


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of a model that is passed in memory, which is meant."""
    found = logging.getLogger("lm_eval")
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)
