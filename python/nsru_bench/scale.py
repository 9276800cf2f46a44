"""The scale of a projected update: energy by token, open shares by rule, one AdamW step.

    python -m nsru_bench.scale --model runs/smollm2/target --out benchmarks/results/smollm2

--model is a folder with questions beside it, as `make smollm2` makes them. Three tables and a
figure: scale_energy.csv (who holds the energy of the forget activations), scale_rules.csv (what
each way to count leaves open of answers to forget and to keep) and scale_steps.csv (what one step
of AdamW on B changes in an answer token's NLL, by rule and by the power of the editability that
divides alpha).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import rows
from nsru_kernels.nn.inputs import ActivationStream, evaluating
from nsru_kernels.subspaces.collection import SubspaceSet
from nsru_kernels.subspaces.estimate import open_rank
from nsru_train.config import ModelConfig
from nsru_train.data.encode import Encoded, collate, encode_qa
from nsru_train.data.records import QA
from nsru_train.demo.sets import target_sets
from nsru_train.estimating import token_batches
from nsru_train.loading import load_model
from nsru_train.losses.nll import answer_states

KINDS = ("first", "template", "question", "answer")
# Rule -> tokens scaled to norm 1, and the editability counted on the positions of answers only.
RULES = {"all energy": (False, False), "unit tokens": (True, False), "unit answers": (True, True)}
FLOORS = (0.02, 0.05, 0.2)
POWERS = (0.0, 0.5, 1.0)
LR = 5e-4
WIDTH = 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder with its questions")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 6, 11, 17, 23, 28])
    parser.add_argument(
        "--questions", type=int, default=60, help="retain questions; a third forget"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    model, tokenizer = load_model(ModelConfig(args.model))
    sets = target_sets(args.model)
    forget, retain = sets.forget[: args.questions // 3], sets.retain_unseen[: args.questions]
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f"layers.{n}." in name for n in args.layers)
    ]
    columns = rows.run_columns("transformers")

    energy = _energy(model, tokenizer, forget, targets)
    rows.replace(args.out / "scale_energy.csv", [{**row, **columns} for row in energy])
    found: dict[tuple[str, float], SubspaceSet] = {}
    for rule, (unit, answers) in RULES.items():
        whole = nk.estimate_retain_subspaces(
            model,
            token_batches(model, tokenizer, retain, max_tokens=4096, max_length=512),
            targets,
            width=WIDTH,
            forget_batches=token_batches(
                model, tokenizer, forget, max_tokens=4096, max_length=512, answers_only=answers
            ),
            min_editability=min(FLOORS),
            unit_tokens=unit,
        )
        found |= {(rule, floor): _at_floor(whole, floor) for floor in FLOORS}
    rules = []
    for (rule, floor), subspaces in found.items():
        shares = {
            name: _open_answers(model, tokenizer, records, subspaces)
            for name, records in {"forget": forget, "retain": retain}.items()
        }
        rules += [
            {
                "rule": rule,
                "floor": floor,
                "input": entry.name,
                "rank": entry.rank,
                "editability": entry.editability,
                **{f"{name}_open": share[entry.name] for name, share in shares.items()},
            }
            for entry in subspaces.inputs
        ]
        print(rule, floor, {k: fmean(v.values()) for k, v in shares.items()}, flush=True)
    rows.replace(args.out / "scale_rules.csv", [{**row, **columns} for row in rules])
    steps = _steps(model, tokenizer, forget[:8], retain[:8], targets, found)
    rows.replace(args.out / "scale_steps.csv", [{**row, **columns} for row in steps])
    draw(energy, rules, steps, args.out / "scale.png")


def _at_floor(whole: SubspaceSet, floor: float) -> SubspaceSet:
    """The subspaces of the largest ranks that leave this much open, out of wider ones."""
    subspaces, inputs = {}, []
    for entry in whole.inputs:
        shares = entry.editability_by_rank[: entry.rank + 1]
        rank = open_rank(shares, floor)
        inputs.append(dataclasses.replace(entry, rank=rank, editability=shares[rank]))
        subspaces |= dict.fromkeys(entry.modules, whole[entry.name].truncate(rank))
    return SubspaceSet(subspaces, inputs, whole.fingerprint)


def _kinds(tokenizer, records: Sequence[QA]) -> list[tuple[Encoded, Tensor]]:
    """Each sequence with the kind of every position; an answer's are those that predict it."""
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]
    prompts = [item.input_ids[: item.answer_start] for item in encoded]
    start, end = _shared(prompts), _shared([prompt[::-1] for prompt in prompts])
    made = []
    for item in encoded:
        kind = torch.full((len(item),), KINDS.index("question"))
        kind[:start] = kind[item.answer_start - end : item.answer_start] = KINDS.index("template")
        kind[item.answer_start - 1 : -1] = KINDS.index("answer")
        kind[0], kind[-1] = KINDS.index("first"), -1
        made.append((item, kind))
    return made


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Number of first entries that are the same in all sequences."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _energy(model, tokenizer, records: Sequence[QA], targets: list[str]) -> list[dict[str, Any]]:
    """Share of ‖X‖² that each kind of position holds, by input; the last EOS is left out."""
    sums = {name: torch.zeros(len(KINDS)) for name in targets}
    counts = torch.zeros(len(KINDS))
    stream = ActivationStream(model, {name: model.get_submodule(name) for name in targets})
    with evaluating(model):
        for item, kind in _kinds(tokenizer, records):
            inside = kind >= 0
            counts += torch.bincount(kind[inside], minlength=len(KINDS))

            def add(name: str, x: Tensor) -> None:
                norms = x[0].float().square().sum(1)[inside]  # noqa: B023
                sums[name].index_add_(0, kind[inside], norms)  # noqa: B023

            consume = {name: lambda x, _, name=name: add(name, x) for name in targets}
            stream.feed([{"input_ids": torch.tensor([item.input_ids])}], consume, None)
    return [
        {
            "input": name,
            "kind": kind,
            "tokens": (counts[i] / counts.sum()).item(),
            "energy": (energy[i] / energy.sum()).item(),
        }
        for name, energy in sums.items()
        for i, kind in enumerate(KINDS)
    ]


def _open_answers(
    model, tokenizer, records: Sequence[QA], subspaces: SubspaceSet
) -> dict[str, float]:
    """‖P x‖²/‖x‖², mean over the positions that predict answers, by input."""
    shares: dict[str, list[Tensor]] = {entry.name: [] for entry in subspaces.inputs}

    def look(name: str, x: Tensor, keep: Tensor | None) -> None:
        x_MK = x.flatten(0, -2) if keep is None else x[keep]
        inside = (x_MK @ subspaces[name].basis).square().sum(1) / x_MK.square().sum(1)
        shares[name].append(1 - inside)

    consume = {name: lambda x, keep, name=name: look(name, x, keep) for name in shares}
    batches = token_batches(
        model, tokenizer, records, max_tokens=4096, max_length=512, answers_only=True
    )
    with evaluating(model):
        linears = {name: model.get_submodule(name) for name in shares}
        ActivationStream(model, linears).feed(batches, consume, None)
    return {name: torch.cat(found).mean().item() for name, found in shares.items()}


def _steps(
    model,
    tokenizer,
    forget: Sequence[QA],
    kept: Sequence[QA],
    targets: list[str],
    found: Mapping[tuple[str, float], SubspaceSet],
) -> list[dict[str, Any]]:
    """Root mean square change of an answer token's NLL by one step of AdamW up the forget NLL."""
    batches = {
        name: collate(
            [encode_qa(tokenizer, qa.question, qa.answer) for qa in records], tokenizer.pad_token_id
        )
        for name, records in {"forget": forget, "kept": kept}.items()
    }
    with torch.no_grad():
        start = {name: answer_states(model, batch).nll() for name, batch in batches.items()}
    ways: dict[tuple[str, float], SubspaceSet | None] = {("none", 1.0): None, **found}
    made = []
    for (rule, floor), subspaces in ways.items():
        torch.manual_seed(0)
        nk.swap_linears(model, targets, rank=8, alpha=16, subspaces=subspaces, siblings=False)
        modules = {name: model.get_submodule(name) for name in targets}
        (-answer_states(model, batches["forget"]).nll().mean()).backward()
        with torch.no_grad():
            for module in modules.values():
                # AdamW's first step: its second moment is the gradient's own square.
                module.lora_B.copy_(-LR * module.lora_B.grad.sign())
        for power in POWERS if subspaces is not None else (0.0,):
            for entry in subspaces.inputs if subspaces is not None else ():
                for name in entry.modules:
                    modules[name].alpha = 16 / entry.editability**power
            with torch.no_grad():
                change = {
                    name: (answer_states(model, batch).nll() - start[name]).square().mean().sqrt()
                    for name, batch in batches.items()
                }
            made.append(
                {"rule": rule, "floor": floor, "power": power, "lr": LR}
                | {f"{name}_change": value.item() for name, value in change.items()}
            )
            print(made[-1], flush=True)
        for module in modules.values():
            nn.init.zeros_(module.lora_B)
        nk.merge_adapters(model)
    return made


def draw(
    energy: Sequence[Mapping[str, Any]],
    rules: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """The three tables side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4))
    names = list(dict.fromkeys(row["input"] for row in rules))
    bottom = [0.0] * len(names)
    for kind, colour in zip(KINDS, ("#b03a2e", "#bbbbbb", "#7fb3d5", "#1f618d"), strict=True):
        held = {row["input"]: row["energy"] for row in energy if row["kind"] == kind}
        left.bar(
            range(len(names)), [held[n] for n in names], bottom=bottom, color=colour, label=kind
        )
        bottom = [low + held[name] for low, name in zip(bottom, names, strict=True)]
    short = [name.removeprefix("model.layers.").replace("self_attn.", "") for name in names]
    left.set_xticks(range(len(names)), short, rotation=90, fontsize=6)
    left.set_title("Share of the forget activations' energy", fontsize=9, pad=20)
    left.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    for rule, colour in zip(RULES, ("#b03a2e", "#e59866", "#1f618d"), strict=True):
        shown = [row for row in rules if row["rule"] == rule and row["floor"] == 0.05]
        middle.scatter(
            [row["retain_open"] for row in shown], [row["forget_open"] for row in shown],
            s=16, color=colour, label=rule,
        )  # fmt: skip
    middle.set(xscale="log", yscale="log")
    middle.set_title("Open at a floor of 5 %, each input (↖ better)", fontsize=9)
    middle.set_xlabel("share of answers to keep")
    middle.set_ylabel("share of answers to forget")
    middle.legend(fontsize=7)
    for power, marker in zip(POWERS, "os^", strict=True):
        shown = [r for r in steps if r["power"] == power and r["rule"] == "unit answers"]
        right.plot(
            [row["floor"] for row in shown], [row["forget_change"] for row in shown],
            marker=marker, label=f"alpha / editability^{power:g}",
        )  # fmt: skip
    plain = next(row for row in steps if row["rule"] == "none")
    right.axhline(plain["forget_change"], color="#888", lw=0.8, label="LoRA")
    right.set(xscale="log", yscale="log")
    right.set_xticks(FLOORS, [f"{floor:.0%}" for floor in FLOORS])
    right.minorticks_off()
    right.set_title("Change of a forget token's NLL by one step", fontsize=9)
    right.set_xlabel("floor of the editability")
    right.set_ylabel("root mean square")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
