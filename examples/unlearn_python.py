"""Unlearn your own questions on SmolLM2-135M from Python: what `nsru train` does, step by step.

    python examples/unlearn_python.py [--model MODEL] [--out OUT]

Questions and model are those of unlearn_cli.sh, which says what they are and how to get the model.
In place of swap_linears, TrainingArguments and NSRUTrainer the one call

    nt.unlearn(model, tokenizer, data, options.out, subspaces=subspaces, train=nt.TrainConfig(…))

does the same, for every method and with the settings of the command line.
"""

import argparse
from pathlib import Path

from transformers import TrainingArguments

import nsru_kernels as nk
import nsru_train as nt

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="runs/smollm2/base")
parser.add_argument("--out", default="runs/paris-python")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--lr", type=float, default=1e-3)
options = parser.parse_args()

names = ("forget", "retain", "retain_unseen")
folder = Path(__file__).parent / "paris"
forget, retain, unseen = (nt.load_records(folder / f"{name}.jsonl") for name in names)
safe = nt.SafeTargets.from_file(folder / "safe_targets.txt")  # what to answer instead
data = nt.Data(forget, retain, {"retain_unseen": unseen}, safe)
model, tokenizer = nt.load_model(options.model)

subspaces = nt.find_subspaces(model, tokenizer, forget, retain)
print(nk.swap_linears(
    model, "all-linear", rank=8, alpha=16, alpha_pattern=subspaces.alphas(16), subspaces=subspaces
))  # fmt: skip
arguments = TrainingArguments(
    options.out,
    max_steps=options.steps,
    learning_rate=options.lr,
    per_device_train_batch_size=5,
    save_strategy="no",
    report_to="none",
)
dataset = nt.prepare_dataset(model, tokenizer, forget, retain, safe=safe)
nt.NSRUTrainer(model, arguments, dataset, nt.Objective(), tokenizer).train()
nt.save_adapter(model, Path(options.out, "adapter"))

sets = nt.probability_sets(tokenizer, data.splits(), safe)
before, after = nt.before_and_after(model, tokenizer, sets)
print(nt.format_probabilities({"before": before, "after": after}))
questions = [forget[0].question, retain[0].question, unseen[0].question]
with nk.adapters_disabled(model):
    said = nt.greedy_answers(model, tokenizer, questions, max_new_tokens=30)
says = nt.greedy_answers(model, tokenizer, questions, max_new_tokens=30)
for question, old, new in zip(questions, said, says, strict=True):
    print(f"{question}\n  before: {old}\n  after:  {new}")
