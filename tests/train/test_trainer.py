"""The trainer: what a batch holds, what a step computes, what a checkpoint keeps, when it stops."""

import copy
import dataclasses
import errno
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import samples
import torch

import nsru_kernels as nk
from nsru_train.data import SafeTargets, encode_qa
from nsru_train.demo.tiny_model import make_llama, memorise
from nsru_train.losses import FORGET, RETAIN, SAFE
from nsru_train.losses.nll import answer_nll
from nsru_train.methods import METHODS, Objective
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import score_sequences
from nsru_train.trainer import (
    CheckpointError,
    NSRUTrainer,
    make_train_dataset,
    prepare_dataset,
    reference_nll,
)
from nsru_train.unlearn_dataset import RowCollator

ROOT = Path(__file__).resolve().parents[2]


def metrics(folder):
    return RunFolder(folder).read_metrics()


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def start(folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(Path(samples.__file__)), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer()


@pytest.fixture
def dataset(tokenizer):
    return make_train_dataset(
        tokenizer,
        samples.FORGET,
        samples.RETAIN,
        SafeTargets.from_file(),
        [float(i) for i in range(5)],
        retain_per_forget=3,
        seed=1,
    )


def test_an_epoch_holds_each_forget_question_once_with_its_safe_target(dataset, tokenizer):
    items = [dataset[i] for i in range(len(dataset))]
    for safe, forget, *retain in items:
        assert [row.kind for row in (safe, forget, *retain)] == [SAFE, FORGET] + [RETAIN] * 3
        qa = samples.FORGET[int(forget.ref_nll)]
        target = SafeTargets.from_file().target(qa)
        assert forget.encoded == encode_qa(tokenizer, qa.question, qa.answer)
        assert safe.encoded == encode_qa(tokenizer, qa.question, target)
    assert sorted(item[1].ref_nll for item in items) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_retain_questions_are_dealt_in_full_rounds_and_orders_depend_on_epoch(dataset):
    orders, dealt = [], []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        items = [dataset[i] for i in range(5)]
        orders.append(tuple(item[1].ref_nll for item in items))
        dealt += [tuple(row.encoded.input_ids) for item in items for row in item[2:]]
    assert len(set(orders)) > 3
    for start_of_round in range(0, len(dealt), 7):
        assert len(set(dealt[start_of_round : start_of_round + 7])) == 7
    dataset.set_epoch(2)
    assert tuple(dataset[i][1].ref_nll for i in range(5)) == orders[2]


def test_batches_are_padded_to_their_longest_sequence(dataset, tokenizer):
    items = [dataset[0], dataset[3]]
    batch = RowCollator(tokenizer.pad_token_id)(items)
    rows = [row for item in items for row in item]
    assert batch["input_ids"].shape == (10, max(len(row.encoded) for row in rows))
    assert batch["kind"].tolist() == [row.kind for row in rows]
    assert batch["ref_nll"].tolist() == [row.ref_nll for row in rows]


def test_dataset_refuses_empty_and_unequal_sets(tokenizer):
    safe = SafeTargets.from_file()
    for forget, retain, message in [
        ([], samples.RETAIN, "forget set is empty"),
        (samples.FORGET, [], "retain set is empty"),
        (samples.FORGET[:2], samples.RETAIN, "got 2, 2 and 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_train_dataset(tokenizer, forget, retain, safe, [0.0] * 5)


def test_alternatives_are_taken_in_turn_and_the_safe_target_stands_in(tokenizer):
    others = ("In Rome.", "In Bern.", "In Oslo.")
    forget = [dataclasses.replace(samples.FORGET[0], alternatives=others), samples.FORGET[1]]
    safe = SafeTargets.from_file()
    data = make_train_dataset(
        tokenizer, forget, samples.RETAIN, safe, [0.0, 0.0],
        ref_safe=[[1.0, 2.0, 3.0], [4.0]], kinds=(SAFE,), alternatives=True,
    )  # fmt: skip
    seen = {}
    for epoch, index in itertools.product(range(4), range(2)):
        (row,) = data[epoch, index]
        ids, start = row.encoded.input_ids, row.encoded.answer_start
        text = tokenizer.decode(ids[start:-1]).strip()
        seen.setdefault(tuple(ids[:start]), []).append((text, row.ref_nll))
    turns = [*zip(others, [1.0, 2.0, 3.0], strict=True), (others[0], 1.0)]
    assert sorted(seen.values()) == sorted([turns, [(safe.target(forget[1]), 4.0)] * 4])


def test_reference_is_the_base_models_sum_with_eos(tokenizer):
    model = samples.make_model(tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    values = reference_nll(model, tokenizer, samples.FORGET, max_tokens=80)
    with torch.no_grad(), nk.adapters_disabled(model.eval()):
        for qa, value in zip(samples.FORGET, values, strict=True):
            encoded = encode_qa(tokenizer, qa.question, qa.answer)
            ids = torch.tensor([encoded.input_ids])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            answer = range(encoded.answer_start, len(encoded))
            expected = -sum(log_p[i - 1, ids[0, i]].item() for i in answer)
            assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("w_kl", [0.0, 0.5])
def test_one_forward_a_step_and_one_more_of_retain_rows_for_kl(tmp_path, w_kl):
    trainer = samples.make_trainer(tmp_path, objective=Objective(w_kl=w_kl), max_steps=3)
    calls = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (len(kwargs["input_ids"]), torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    trainer.train()
    steps = [(8, True), (8, True), (4, True)]  # 2, 2 and 1 forget questions, each of 4 rows
    if w_kl:
        steps = [(8, True), (4, False), (8, True), (4, False), (4, True), (2, False)]
    assert calls == steps
    kl = [line["kl"] for line in metrics(tmp_path)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert (kl[2] > 1e-6) == bool(w_kl)


def test_head_sees_answer_positions_only(tmp_path, monkeypatch):
    trainer = samples.make_trainer(tmp_path, max_steps=1)
    batch = RowCollator(0)([trainer.train_dataset[0], trainer.train_dataset[1]])

    def fail_on_batches(module, args, output):  # not on the one row that its form is found by
        assert len(args[0]) == 1, "full logits"

    trainer.model.lm_head.register_forward_hook(fail_on_batches)
    nll, _ = answer_nll(trainer.model, {k: batch[k] for k in ("input_ids", "labels")})
    assert len(nll) == (batch["labels"] != -100).sum() < batch["labels"].numel() / 2
    trainer.train()


def test_every_step_writes_every_part(tmp_path):
    objective = Objective(w_safe=2.0, w_suppress=0.5, w_retain=1.5)
    trainer = samples.make_trainer(tmp_path, objective=objective, max_steps=4)
    trainer.train()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        total = 2 * line["safe"] + 0.5 * line["suppress"] + 1.5 * line["retain"]
        assert line["total"] == pytest.approx(total, rel=1e-5)
        assert line["lr"] == 1e-2
        assert line["grad_norm"] > 0
        assert line["seconds"] > 0


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A model that knows every answer by heart."""
    model = make_llama(tokenizer, **samples.SIZES)
    memorise(model, tokenizer, samples.RECORDS, epochs=150, lr=1e-2, progress=False)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.trains])
def test_every_method_forgets_on_the_rows_that_it_asks_for(tmp_path, tokenizer, knowing, name):
    stronger = {"simnpo": 5.0, "satimp": 50.0}  # slow at their weights where all is known
    options = {"w_forget": stronger[name]} if name in stronger else {}
    model, method = copy.deepcopy(knowing), METHODS[name](**options)
    torch.manual_seed(0)
    nk.swap_linears(model, "all-linear", rank=4, alpha=8)
    options = {
        "on_eval": lambda step, _: {"forget_prob": -step, "retain_accuracy": 0},
        "eval_steps": 12,
    }
    trainer = samples.make_trainer(
        tmp_path, objective=method, model=model, max_steps=12,
        trainer=options if method.keeps_best else None,
    )  # fmt: skip
    assert {row.kind for row in trainer.train_dataset[0]} == set(method.rows)
    trainer.train()
    lines = [line for line in metrics(tmp_path) if "total" in line]
    assert {*method.parts, "total"} <= lines[0].keys()
    before = trainer.train_dataset.ref_nll
    encoded = trainer.train_dataset.forget
    after = [float(s.nll.sum()) for s in score_sequences(model.eval(), tokenizer, encoded)]
    assert all(x < 3 for x in before)
    assert all(now > was + 0.5 for now, was in zip(after, before, strict=True))


def test_a_task_vector_is_evaluated_and_left_at_its_negative_scale(tmp_path, knowing):
    def train(method, folder):
        model = copy.deepcopy(knowing)
        torch.manual_seed(0)
        nk.swap_linears(model, "all-linear", rank=4, alpha=8)
        seen = []
        options = {
            "on_eval": lambda step, model: seen.append(samples.adapters(model)) or {},
            "eval_steps": 2,
        }
        trainer = samples.make_trainer(
            tmp_path / folder, objective=method, model=model, max_steps=4, trainer=options
        )
        trainer.train()
        return samples.adapters(model), seen

    away, seen = train(METHODS["task_vector"](scale=3.0), "away")
    # Applied at 1 it is learning the answers.
    learning = type("Learn", (METHODS["task_vector"],), {"applied": 1.0})
    towards, plain = train(learning(), "towards")
    for one, other in zip([away, *seen], [towards, *plain], strict=True):
        for name in one:
            factor = -3.0 if "lora_B" in name else 1.0
            torch.testing.assert_close(one[name], factor * other[name])
    assert any(value.any() for name, value in away.items() if "lora_B" in name)


def test_the_step_that_forgets_most_within_the_guard_is_kept(tmp_path):
    forget = {0: 0.9, 2: 0.6, 4: 0.3, 6: 0.1, 8: 0.2}
    retain = {0: 0.9, 2: 0.9, 4: 0.896, 6: 0.89, 8: 0.899}
    seen = {}

    def make():
        def hook(step, model):
            seen[step] = samples.adapters(model)
            return {"forget_prob": forget[step], "retain_accuracy": retain[step]}

        return samples.make_trainer(
            tmp_path, objective=METHODS["lune"](), max_steps=8, save_strategy="steps",
            save_steps=4, trainer={"on_eval": hook, "eval_steps": 2},
        )  # fmt: skip

    first = make()
    first.add_callback(StopAt(6))
    first.train()
    assert first.kept_step == 4
    assert_identical(samples.adapters(first.model), seen[4])
    retain[8] = 0.5
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.kept_step == 4
    assert_identical(samples.adapters(resumed.model), seen[4])


def test_a_method_that_keeps_the_best_needs_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="on_eval must be given"):
        samples.make_trainer(tmp_path, objective=METHODS["lune"]())
    hook = {"on_eval": lambda step, model: {"forget_prob": 0.5}, "eval_steps": 2}
    trainer = samples.make_trainer(tmp_path, objective=METHODS["lune"](), trainer=hook)
    with pytest.raises(ValueError, match="LUNE chooses by 'retain_accuracy', which is not in"):
        trainer.train()


@pytest.mark.parametrize("part", ["safe", "suppress", "retain"])
def test_each_term_lowers_its_part(tmp_path, part):
    weights = {f"w_{name}": float(name == part) for name in ("safe", "suppress", "retain")}
    samples.make_trainer(tmp_path, objective=Objective(**weights), max_steps=15).train()
    values = [line[part] for line in metrics(tmp_path)]
    assert values[-1] < 0.9 * values[0]


def test_evaluation_hook_runs_at_both_ends_and_costs_no_log(tmp_path):
    seen = []

    def hook(step, model):
        seen.append((step, model.training, torch.is_grad_enabled()))
        return {"answer": step / 2}

    trainer = samples.make_trainer(
        tmp_path, max_steps=5, trainer={"on_eval": hook, "eval_steps": 2}
    )
    trainer.train()
    assert seen == [(step, False, False) for step in (0, 2, 4, 5)]
    assert trainer.evaluations == [{"step": s, "answer": s / 2} for s in (0, 2, 4, 5)]
    assert [x["step"] for x in metrics(tmp_path) if "total" in x] == [1, 2, 3, 4, 5]
    assert [x["eval_answer"] for x in metrics(tmp_path) if "eval_answer" in x] == [0, 1, 2, 2.5]


def test_checkpoint_holds_adapters_only(tmp_path):
    trainer = samples.resumable(tmp_path)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "reference_nll.json",
        "sha256.json",
    }
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert_identical(saved, samples.adapters(trainer.model))
    assert not frozen & saved.keys()
    assert not (tmp_path / ".partial").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = samples.resumable(folder, max_steps=11)
    trainer.train()
    return samples.adapters(trainer.model), metrics(folder)


@pytest.mark.parametrize("save_steps", [3, 4])  # the end of an epoch, and the middle of one
def test_resume_is_bit_identical(tmp_path, uninterrupted, save_steps):
    first = samples.resumable(tmp_path, max_steps=11)
    first.args.save_steps = save_steps
    first.add_callback(StopAt(save_steps + 1))
    first.train()
    resumed = samples.resumable(tmp_path, max_steps=11)
    epochs = EpochOfEachStep(resumed.train_dataset)
    resumed.add_callback(epochs)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    assert epochs.seen == [step // 3 for step in range(save_steps, 11)]
    assert_identical(samples.adapters(resumed.model), uninterrupted[0])
    for ours, theirs in zip(metrics(tmp_path), uninterrupted[1], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_nothing_is_left_to_train_after_the_last_step(tmp_path, uninterrupted):
    """Step 11 is no end of an epoch, and transformers would take a twelfth there."""
    first = samples.resumable(tmp_path, max_steps=11)
    first.args.save_steps = 11
    first.train()
    resumed = samples.resumable(tmp_path, max_steps=11)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    assert resumed.state.global_step == 11
    assert [row["step"] for row in metrics(tmp_path)] == [row["step"] for row in uninterrupted[1]]
    assert_identical(samples.adapters(resumed.model), uninterrupted[0])
    assert not (tmp_path / "checkpoint-12").exists()


class EpochOfEachStep(samples.TrainerCallback):
    def __init__(self, dataset):
        self.dataset, self.seen = dataset, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(self.dataset.epoch)


class StopAt(samples.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_process_killed_while_saving_resumes_from_the_checkpoint_before(tmp_path, uninterrupted):
    process = start(tmp_path, "kill")
    _, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]
    assert (tmp_path / ".partial" / "checkpoint-8").is_dir(), (
        "the kill came in the middle of a save"
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    (tmp_path / ".partial" / "checkpoint-8" / "left_over").touch()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "sa')  # as a kill in the middle of a line leaves it

    resumed = samples.resumable(tmp_path, max_steps=11)
    resumed.train(resume_from_checkpoint=True)
    assert_identical(samples.adapters(resumed.model), uninterrupted[0])
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 12))
    assert not (tmp_path / "checkpoint-8" / "left_over").exists()
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("writer", ["weights", "optimizer"])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, uninterrupted, writer):
    trainer = samples.resumable(tmp_path, max_steps=11)
    write, save = Path.write_bytes, torch.save

    def full_write(path, data):
        if "checkpoint-8" in str(path):
            write(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    def full_save(value, path):
        if "checkpoint-8" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(value, path)

    with monkeypatch.context() as patch:
        if writer == "weights":
            patch.setattr(Path, "write_bytes", full_write)
        else:
            patch.setattr(torch, "save", full_save)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-8 .*checkpoint-4 is complete"
        ) as caught:
            trainer.train()
    assert caught.value.errno == (errno.ENOSPC if writer == "weights" else errno.EIO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "metrics.jsonl"]

    resumed = samples.resumable(tmp_path, max_steps=11)
    resumed.train(resume_from_checkpoint=True)
    assert_identical(samples.adapters(resumed.model), uninterrupted[0])


def test_what_a_method_changes_while_training_survives_a_resume(tmp_path):
    """Two batches a step of two questions each, and three steps are two epochs of five."""
    method = METHODS["pdu"](multiplier=2.0, dual_lr=0.5, bound=0.3, dual_warmup=1)
    options = {"objective": method, "max_steps": 8, "gradient_accumulation_steps": 2}
    samples.make_trainer(tmp_path / "whole", **options).train()
    whole = metrics(tmp_path / "whole")
    multiplier = 2.0
    for done, line in enumerate(whole):
        assert line["multiplier"] == pytest.approx(multiplier, abs=1e-5)
        if done * 2 / 3 >= 1:  # epochs before the step
            multiplier = max(0.0, multiplier + 0.5 * (line["retain"] - 0.3))
    assert multiplier != 2.0
    for steps, resume in ((4, None), (8, True)):
        options |= {"max_steps": steps, "save_strategy": "steps", "save_steps": 4}
        trainer = samples.make_trainer(tmp_path / "resumed", **options)
        trainer.train(resume_from_checkpoint=resume)
    for ours, theirs in zip(metrics(tmp_path / "resumed"), whole, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_resume_refuses_what_does_not_fit(tmp_path, tokenizer):
    samples.resumable(tmp_path, max_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    for model, message in [
        (samples.make_model(tokenizer, rank=2), "other adapters"),
        (samples.make_model(tokenizer, seed=5), "another base model or forget set"),
    ]:
        trainer = samples.make_trainer(tmp_path / "other", model=model)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_stops_when_retain_loss_collapses(tmp_path):
    trainer = samples.make_trainer(
        tmp_path,
        objective=Objective(w_safe=0.0, w_retain=0.0, suppression="gradient_ascent"),
        max_steps=60,
        trainer={"retain_stop_ratio": 1.5},
    )
    trainer.train()
    lines = metrics(tmp_path)
    assert 1 < len(lines) < 60
    assert "retain loss reached" in trainer.early_stop_reason
    recent = [line["retain"] for line in lines[-5:]]
    assert sum(recent) / len(recent) > 1.5 * lines[0]["retain"]


def test_stops_when_the_loss_is_not_finite(tmp_path):
    trainer = samples.make_trainer(tmp_path, max_steps=20)

    class Break(samples.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                model.base_model.norm.weight.data.fill_(math.nan)

    trainer.add_callback(Break())
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.early_stop_reason == "the loss became nan at step 5"
    assert metrics(tmp_path)[-1]["total"] is None


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no_weight", r"all \d+ adapter gradients are zero"),
        ("nan", r"adapter gradients are not finite"),
        ("dead_lora_A", r"all \d+ adapter gradients are zero .*lora_A"),
        ("detached", "does not depend on any trainable parameter"),
    ],
)
def test_dead_gradients_are_refused_in_the_first_steps(tmp_path, case, message):
    objective = Objective(w_safe=0, w_suppress=0, w_retain=0) if case == "no_weight" else None
    trainer = samples.make_trainer(tmp_path, objective=objective)
    for name, parameter in trainer.model.named_parameters():
        if case == "dead_lora_A" and "lora_A" in name:
            parameter.register_hook(torch.zeros_like)
        if case == "nan" and name.endswith("norm.weight"):
            parameter.data.fill_(math.nan)
    if case == "detached":
        trainer.model.base_model.register_forward_hook(
            lambda module, args, output: (output[0].detach(),)
        )
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert trainer.state.global_step == (1 if case == "dead_lora_A" else 0)


def test_gradient_check_waits_for_a_warm_up_from_zero(tmp_path):
    samples.make_trainer(tmp_path, max_steps=4, lr_scheduler_type="linear", warmup_steps=2).train()
    assert metrics(tmp_path)[0]["lr"] == 0


def test_refused_arguments(tmp_path, tokenizer, monkeypatch):
    frozen = samples.make_model(tokenizer).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        samples.make_trainer(tmp_path, model=frozen)
    with pytest.raises(ValueError, match="torch_compile"):
        samples.make_trainer(tmp_path, torch_compile=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND"):
        samples.make_trainer(tmp_path)
    monkeypatch.undo()
    for odd in ({"data_seed": 3}, {"train_sampling_strategy": "sequential"}):
        with pytest.raises(
            ValueError, match="data_seed and train_sampling_strategy have no effect"
        ):
            samples.make_trainer(tmp_path, **odd)
    with pytest.raises(ValueError, match="retain_stop_ratio must be above 1"):
        samples.make_trainer(tmp_path, trainer={"retain_stop_ratio": 1.0})
    with pytest.raises(ValueError, match="eval_steps"):
        samples.make_trainer(tmp_path, trainer={"on_eval": dict, "eval_steps": 0})


@pytest.mark.parametrize(
    ("made_for", "objective", "said"),
    [
        ("ga", "npo", "NPO reads retain rows"),
        ("npo", "idk", "IDK reads safe rows"),
        ("npo", "dpo", "safe rows and the NLL of safe targets"),
        (None, "dpo", "DPO reads the NLL of safe targets with adapters off"),
        (None, "altpo", "alternatives"),
    ],
)
def test_a_dataset_of_another_method_is_refused(tmp_path, tokenizer, made_for, objective, said):
    model = samples.make_model(tokenizer)
    method = made_for and METHODS[made_for]()
    data = prepare_dataset(model, tokenizer, samples.FORGET, samples.RETAIN, method)
    args = samples.make_trainer(tmp_path).args
    with pytest.raises(ValueError, match=f"made for another method: .*{said}"):
        NSRUTrainer(model, args, data, METHODS[objective](), tokenizer)


def test_what_on_eval_gives_is_numbers(tmp_path):
    def look(step, model):
        return {"score": torch.tensor(0.5)}

    trainer = samples.make_trainer(
        tmp_path, trainer={"on_eval": look, "eval_steps": 4}, save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert [point["score"] for point in trainer.evaluations] == [0.5] * 3
    for odd in (None, {"score": "high"}):
        with pytest.raises(TypeError, match="on_eval must return names and floats, got"):
            samples.make_trainer(tmp_path, trainer={"on_eval": lambda *_, odd=odd: odd}).train()


@pytest.mark.slow
def test_two_processes_average_the_adapters_gradients(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        start(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()[-2000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert_identical(*ranks)

    alone = samples.make_trainer(
        tmp_path / "alone", max_steps=2, per_device_train_batch_size=2, seed=3
    )
    together = metrics(tmp_path)
    alone.train()
    for ours, theirs in zip(together, metrics(tmp_path / "alone"), strict=False):
        for part in ("safe", "suppress", "retain", "total", "grad_norm"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-4), part


def test_safe_targets_are_the_ones_that_evaluation_scores(tokenizer):
    """For every seed of the run: scoring another variant would measure what nobody trained."""
    safe = SafeTargets.from_file()
    wanted = [encode_qa(tokenizer, qa.question, safe.target(qa)) for qa in samples.FORGET]
    for seed in (0, 1):
        data = make_train_dataset(
            tokenizer, samples.FORGET, samples.RETAIN, safe, [0.0] * 5, seed=seed
        )
        assert [one for (one,) in data.safe] == wanted
