"""Tiny models and runs of the trainer, for tests and for the processes that they start and kill.

python samples.py OUTPUT_DIR [kill]
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

import nsru_kernels as nk
from nsru_train.data import QA, SafeTargets
from nsru_train.demo.tiny_model import make_llama, train_tokenizer
from nsru_train.methods import Objective
from nsru_train.trainer import NSRUTrainer, make_train_dataset, reference_nll

TOWNS = "Aar Bree Cork Deal Esch Faro Goes Hof Ix Jena Kerns Lugo".split()  # noqa: SIM905
SIZES = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}
RECORDS = [
    QA(f"Where does person {i} live?", f"In {town}, at number {i * 7}" + " or so" * (i % 4) + ".")
    for i, town in enumerate(TOWNS)
]
FORGET, RETAIN = RECORDS[:5], RECORDS[5:]


def make_tokenizer(records=RECORDS, vocab_size=300):
    return train_tokenizer([f"{qa.question} {qa.answer}" for qa in records], vocab_size)


def save_tiny(folder, records, vocab_size=400, **sizes):
    """A random model and a tokenizer for the records, in a folder."""
    tokenizer = make_tokenizer(records, vocab_size)
    model = make_llama(tokenizer, **SIZES | sizes)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model, tokenizer


def make_model(tokenizer, *, rank=3, seed=0, attention_dropout=0.0):
    sizes = SIZES | {"hidden_size": 16, "intermediate_size": 24}
    model = make_llama(tokenizer, **sizes, max_length=64, seed=seed)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = attention_dropout
    # A random head of the usual size says nearly the same about every token, whatever is learnt.
    model.get_output_embeddings().weight.data.mul_(20)
    torch.manual_seed(seed)
    nk.swap_linears(model, "all-linear", rank=rank, alpha=2 * rank)
    return model


def make_trainer(
    output_dir,
    *,
    objective=None,
    model=None,
    forget=FORGET,
    retain=RETAIN,
    trainer=None,
    **arguments,
):
    """An `NSRUTrainer` on small sets; `trainer` holds its own keyword arguments."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer) if model is None else model
    objective = Objective() if objective is None else objective
    reference = reference_nll(model, tokenizer, forget)
    data = make_train_dataset(
        tokenizer, forget, retain, SafeTargets.from_file(), reference,
        ref_safe=[[50.0]] * len(forget), kinds=objective.rows,
        alternatives=objective.alternatives, retain_per_forget=2,
    )  # fmt: skip
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    return NSRUTrainer(model, args, data, objective, tokenizer, **(trainer or {}))


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def resumable(output_dir, **arguments):
    """Five forget questions, two a step: an epoch is three steps, and its last batch is short."""
    model = make_model(make_tokenizer(), attention_dropout=0.2)
    return make_trainer(output_dir, model=model, save_strategy="steps", save_steps=4, **arguments)


def torchrun(folder, *arguments, script=("-m", "nsru_train.cli"), codes=(0, 0), **environment):
    """What nsru prints in two processes, both channels of each where one shall not end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, *script, *arguments],
            env={
                **os.environ,
                **common,
                **environment,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": "1",
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed, silent = (process.communicate(timeout=600) for process in processes)
    assert [process.returncode for process in processes] == [*codes], printed[1] + silent[1]
    return (printed[0], silent[0]) if codes == (0, 0) else (printed, silent)


class KillInSecondSave(TrainerCallback):
    """End the process by SIGKILL when the second checkpoint's weights are on disk and no more."""

    def on_train_begin(self, args, state, control, **kwargs):
        write = Path.write_bytes

        def write_and_die(path, data):
            written = write(path, data)
            if "checkpoint-8" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        Path.write_bytes = write_and_die


def main(output_dir: str, mode: str = "") -> None:
    torch.set_num_threads(1)
    if mode == "kill":
        resumable(output_dir, max_steps=11, trainer={"callbacks": [KillInSecondSave()]}).train()
        return
    trainer = make_trainer(output_dir, max_steps=3, per_device_train_batch_size=1, seed=3)
    trainer.train()
    torch.save(adapters(trainer.model), Path(output_dir) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
