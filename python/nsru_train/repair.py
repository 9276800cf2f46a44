"""Repairs of a finished run: retain answers that it lost, brought back by a few steps, or by none.

After the local perturbation theory of arXiv 2606.02398, of which only the abstract was at hand:
what counts as a coordinate, how many are taken and how long is trained are our definitions.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

import nsru_kernels as nk
from nsru_kernels.checks import check_range
from nsru_kernels.hf.peft_format import load_lora_adapter
from nsru_kernels.nn.inputs import evaluating
from nsru_kernels.subspaces.collection import SubspaceSet
from nsru_train.adapters import check_plain, save_adapter
from nsru_train.alternatives import add_alternatives
from nsru_train.data.encode import Encoded
from nsru_train.estimating import token_batches
from nsru_train.eval_results import format_probabilities
from nsru_train.evaluation import probability_sets, watched
from nsru_train.loading import Data, load_data, load_model, without_long
from nsru_train.losses.batch import RETAIN, Batch
from nsru_train.losses.nll import answer_nll
from nsru_train.methods.method import Method, mean
from nsru_train.own_texts import add_own_requests
from nsru_train.pipeline import Guarded, Outcome, kept_point, unlearn
from nsru_train.report import write_report
from nsru_train.run_config import saved_sections, say_changed_adapter, say_changed_sets
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import quick_probabilities

QUESTIONS = 200  # of a set, at most, at each evaluation


@dataclass(frozen=True)
class RetainOnly(Method):
    """Mean NLL of the retain answers' tokens: what a refresh trains, in the adapters of ``run``."""

    run: Method

    rows = (RETAIN,)
    parts = ("retain",)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        retain = mean(batch[RETAIN].nll)
        return {"retain": retain, "total": retain}

    def targets(self, model: nn.Module) -> Sequence[str] | None:
        return self.run.targets(model)

    @property
    def starts_elsewhere(self) -> bool:
        return self.run.starts_elsewhere

    def begin(self, *arguments: Any) -> None:
        self.run.begin(*arguments)


class FinishedRun:
    """A run with an adapter, and the folder of what is made of it.

    Args:
        path: of the run, by ``nsru train``.
        out: folder of the results.

    Raises:
        ValueError: the run's folder does not say model and data, or ``out`` holds results.
    """

    def __init__(self, path: str, out: str) -> None:
        self.started = time.perf_counter()
        self.path, self.adapter = Path(path), Path(path, "adapter")
        check_plain(self.adapter)
        self.sections: dict[str, Any] = saved_sections(path)
        if Path(out, "results.json").exists():
            raise ValueError(f"out: {out} holds results; give another folder, or remove it.")
        config = self.sections["data"]
        data = load_data(config)
        say_changed_sets(path, data.digests())
        say_changed_adapter(path, str(self.adapter))
        self.folder = RunFolder(out).lock()
        _, self.tokenizer = loaded = load_model(self.sections["model"], config)
        self._loaded = [loaded[0]]
        self.max_length = config.max_length
        self.data: Data = without_long(data, self.tokenizer, config)
        self.data.forget = add_alternatives(
            loaded[0], self.tokenizer, self.data.forget, config, [self.sections["objective"]],
            self.path / "alternatives.jsonl",
        )  # fmt: skip
        add_own_requests(
            loaded[0],
            self.tokenizer,
            self.data,
            config,
            self.path / "own_requests.jsonl",
            keep=True,
        )
        self.asked = probability_sets(
            self.tokenizer, self.data.splits(), self.data.safe,
            max_length=self.max_length, limit=QUESTIONS,
        )  # fmt: skip

    def base(self) -> nn.Module:
        """The base model, loaded anew each time: whoever asks may change it."""
        if self._loaded:
            return self._loaded.pop()
        return load_model(self.sections["model"])[0]

    def probe(
        self, model: nn.Module, asked: Mapping[str, Sequence[Encoded]] | None = None
    ) -> dict[str, float]:
        """Mean answer probabilities of the sets, or of others."""
        return quick_probabilities(model, self.tokenizer, self.asked if asked is None else asked)

    def write(
        self, kind: str, setup: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any
    ) -> None:
        """results.json and report.html; the rows as a printed table too."""
        sets = {name.removesuffix("_prob"): len(asked) for name, asked in self.asked.items()}
        self.folder.write_environment()
        self.folder.write_results(
            {
                "kind": kind,
                "seconds": time.perf_counter() - self.started,
                "setup": {
                    "run": str(self.path),
                    "questions": sets,
                    "sets": self.data.digests(),
                    **setup,
                },
                "methods": rows,
                **more,
            }
        )
        write_report(self.folder)
        print(format_probabilities({row["method"]: row for row in rows}))


def refresh(
    path: str,
    out: str,
    *,
    steps: int = 20,
    lr: float | None = None,
    eval_steps: int = 5,
    seed: int = 0,
    control: bool = True,
    progress: bool = True,
) -> None:
    """A few steps of the run's adapters on retain answers alone, still in their null space.

    The control is as many steps more of the run's own method. See ``nsru refresh --help``.

    Raises:
        ValueError: an option out of its range, or as `FinishedRun`.
    """
    check_range("steps", steps, "must be ≥ 1", whole=True)
    check_range("eval_steps", eval_steps, "must be ≥ 1", whole=True)
    check_range("seed", seed, "must be from 0 to 2³² - 1", whole=True)
    run = FinishedRun(path, out)
    train = run.sections["train"]
    train = replace(
        train, steps=steps, lr=train.lr if lr is None else lr, warmup=0.0, save_steps=0, seed=seed,
        report_to=[],
    )  # fmt: skip
    lora, layers, method = (run.sections[name] for name in ("lora", "subspace", "objective"))
    homes = (run.path, run.path.parent.parent)  # of its own, or of the comparison that it is of
    home = next((one for one in homes if (one / "subspaces" / "index.json").is_file()), run.path)
    subspaces = SubspaceSet.load(home / "subspaces") if lora.project else None

    def go_on(name: str, objective: Method) -> tuple[nn.Module, Outcome | Guarded]:
        model = run.base()
        outcome = unlearn(
            model,
            run.tokenizer,
            run.data,
            run.folder.path / "runs" / name,
            targets=layers.targets,
            exclude=layers.exclude,
            subspaces=subspaces,
            lora=lora,
            objective=objective,
            train=train,
            max_length=run.max_length,
            on_eval=lambda _, model: run.probe(model, watched(objective, run.asked)),
            eval_steps=eval_steps,
            adapter=run.adapter,
            progress=progress,
        )
        folder = run.folder.path / "runs" / name / "adapter"
        save_adapter(model, folder, objective)
        return model, outcome

    model, refreshed = go_on("refreshed", RetainOnly(method))
    with nk.adapters_disabled(model):
        rows = [{"method": "before", "seed": seed, **run.probe(model)}]
    outcomes = {"refreshed": refreshed}
    if control:
        outcomes["continued"] = go_on("continued", method)[1]
    rows.append({"seed": seed, **refreshed.evaluations[0], "method": "unlearned"})
    rows += [
        {
            "seed": seed,
            **kept_point(one.evaluations, one.kept_step),
            "method": name,
            **one.results(),
        }
        for name, one in outcomes.items()
    ]
    adapter = run.folder.path / "runs" / "refreshed" / "adapter"
    shutil.copytree(adapter, run.folder.adapter_dir, dirs_exist_ok=True)
    run.write(
        "refresh",
        {"steps": steps, "lr": train.lr},
        rows,
        frontier=[
            {"method": name, "seed": seed, **point}
            for name, one in outcomes.items()
            for point in one.evaluations
        ],
        leakage=refreshed.leakage,
    )


def rollback(
    path: str,
    out: str,
    *,
    shares: Sequence[float] = (0.001, 0.005, 0.01),
    rho: float = 1.0,
    items: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Undo the few entries of B that cost retain answers most, without training.

    Beside each share stands a control: as many entries, drawn at random. See
    ``nsru rollback --help``.

    Raises:
        ValueError: an option out of its range, or as `FinishedRun`.
    """
    shares = sorted(set(shares))
    if not shares:
        raise ValueError("shares: expected one share or more, got none.")
    for share in shares:
        check_range("shares", share, "must be a share from 0 to 1")
    check_range("rho", rho, "must be a share from 0 to 1")
    check_range("items", items, "must be ≥ 1", whole=True)
    check_range("seed", seed, "must be from 0 to 2³² - 1", whole=True)
    run = FinishedRun(path, out)
    model = run.base()
    load_lora_adapter(model, run.adapter)
    with nk.adapters_disabled(model):
        rows: list[dict[str, Any]] = [{"method": "before", **run.probe(model)}]
    rows.append({"method": "unlearned", **run.probe(model)})
    factors = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    trained = parameters_to_vector(factors).detach()  # how far each entry went: B starts at zero
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(run.data.retain), generator=generator)[:items].tolist()
    batches = [
        token_batches(
            model, run.tokenizer, [run.data.retain[i]],
            max_tokens=run.max_length, max_length=run.max_length,
        )[0]
        for i in chosen
    ]  # fmt: skip
    costs = 0.5 * diagonal_fisher(model, factors, batches, progress=progress) * trained.square()
    for share in shares:
        count = max(1, round(share * costs.numel()))
        random = torch.randperm(costs.numel(), generator=generator)[:count]
        for name, picked in (("rolled back", costs.topk(count).indices), ("random", random)):
            less = trained.clone()
            less[picked.to(less.device)] *= 1 - rho
            vector_to_parameters(less, factors)
            rows.append({"method": f"{name} {share:.3g}", "entries": count, **run.probe(model)})
            folder = run.folder.path / "adapters" / f"{name.replace(' ', '-')}-{share:.3g}"
            save_adapter(model, folder)
    setup = {"shares": shares, "rho": rho, "items": len(chosen), "entries": costs.numel()}
    run.write("rollback", setup, [{"seed": seed, **row} for row in rows])


def diagonal_fisher(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    progress: bool = False,
) -> Tensor:
    """Mean over ``batches`` of the squared gradient of their answers' mean NLL.

    Args:
        parameters: whose gradient; some may take no part in a batch.
        batches: as `answer_nll` takes them, one answer each for the usual empirical Fisher.

    Returns:
        All entries of the parameters, one after the other, in their dtype.
    """
    total = torch.zeros_like(parameters_to_vector(parameters))
    with evaluating(model), torch.enable_grad():
        for batch in tqdm(batches, "Fisher", disable=not progress):
            nll, _ = answer_nll(model, batch)
            gradients = torch.autograd.grad(
                nll.mean(), parameters, allow_unused=True, materialize_grads=True
            )
            total += parameters_to_vector(gradients).square()
    return total.detach() / len(batches)
