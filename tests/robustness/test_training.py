"""Training and resuming under what users do to them: every fault has its right value here."""

import errno
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import nsru_kernels as nk
from nsru_kernels import files
from nsru_train import cli, loading
from nsru_train.checkpoints import SUMS, digest, rotate
from nsru_train.data.encode import collate, encode_qa
from nsru_train.losses import SAFE
from nsru_train.losses.nll import answer_logits, answer_states
from nsru_train.run_folder import RunFolder
from nsru_train.sources import save_records
from nsru_train.trainer import CheckpointError, _all_take_part

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import samples


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer()


@pytest.fixture
def batch(tokenizer):
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in samples.FORGET]
    return collate(encoded, tokenizer.pad_token_id)


@pytest.mark.parametrize("back", ["merge", "peft"])
def test_a_head_that_changes_after_scoring_is_scored_as_it_is(tokenizer, batch, back):
    """Swapped, wrapped by PEFT, or merged again: what was learnt of the old head must not stay."""
    model = samples.make_llama(tokenizer, **samples.SIZES).requires_grad_(False)
    answer_states(model, batch)
    if back == "peft":
        import peft

        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        nk.swap_linears(model, ["lm_head"], rank=2, alpha=4)
        torch.nn.init.normal_(model.lm_head.lora_B)
    nll = answer_states(model, batch).nll()
    torch.testing.assert_close(nll, answer_logits(model, batch).nll())
    nll.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    if back == "merge":
        nk.merge_adapters(model)
        states = answer_states(model, batch)
        assert not hasattr(states, "logits")
        torch.testing.assert_close(states.nll(), nll)


def first_step(folder, questions, batch, accumulate):
    """Adapters after one step of plain SGD, and the row of metrics.jsonl."""
    tokenizer = samples.make_tokenizer()
    model = samples.make_model(tokenizer)
    for module in model.modules():  # at B = 0 only one of the two factors has a gradient
        if isinstance(module, nk.NSRULinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    trainer = samples.make_trainer(
        folder,
        model=model,
        forget=samples.RECORDS[:questions],
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        max_grad_norm=1e9,
    )
    trainer.train()
    [row] = RunFolder(folder).read_metrics()
    return samples.adapters(model), row


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 3), (9, 2), (7, 2)])
def test_uneven_micro_batches_equal_the_one_big_batch(tmp_path, batch, accumulate):
    whole, expected = first_step(tmp_path / "whole", 10, 10, 1)
    parts, row = first_step(tmp_path / "parts", 10, batch, accumulate)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
    for part in ("safe", "suppress", "retain", "total", "grad_norm"):
        assert row[part] == pytest.approx(expected[part], rel=1e-5), part


def questions_of_each_step(folder, **arguments):
    """(forget question, retain questions) of each step, in order."""
    trainer = samples.make_trainer(folder, **arguments)
    steps = [[]]
    compute = trainer.compute_loss

    def note(model, inputs, **kwargs):
        per_question = len(inputs["kind"]) // int((inputs["kind"] == SAFE).sum())
        for rows in inputs["input_ids"].split(per_question):
            forget, *retain = (tuple(ids.tolist()) for ids in rows[1:])
            steps[-1].append((trim(forget), [trim(ids) for ids in retain]))
        return compute(model, inputs, **kwargs)

    class NewStep(samples.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append([])

    trainer.compute_loss = note
    trainer.add_callback(NewStep())
    trainer.train()
    return steps[:-1]


def trim(ids):
    pad = samples.make_tokenizer().pad_token_id
    return tuple(id for id in ids if id != pad)


@pytest.mark.parametrize(
    ("questions", "batch", "accumulate", "sizes"),
    [
        (4, 4, 8, [32, 32]),
        (5, 2, 2, [4, 3, 3, 4, 3, 3]),  # 2 + 2, 1 + 2, 2 + 1
        (5, 8, 3, [15]),
    ],
)
def test_accumulation_goes_on_over_the_end_of_an_epoch(
    tmp_path, questions, batch, accumulate, sizes
):
    forget = samples.RECORDS[:questions]
    steps = questions_of_each_step(
        tmp_path,
        forget=forget,
        max_steps=len(sizes),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
    )
    assert [len(step) for step in steps] == sizes
    asked = [question for step in steps for question, _ in step]
    epochs = [asked[i : i + questions] for i in range(0, len(asked), questions)]
    assert all(len(set(epoch)) == questions for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1 or len(epochs) == 1


def test_epochs_asked_for_are_those_of_the_questions(tmp_path):
    steps = questions_of_each_step(
        tmp_path,
        forget=samples.RECORDS[:4],
        max_steps=-1,
        num_train_epochs=16,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
    )
    assert [len(step) for step in steps] == [32, 32]


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor is read by no method's loss"):
        samples.make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_saving_by_epochs_that_steps_run_over_is_said(tmp_path, caplog):
    samples.make_trainer(tmp_path, save_strategy="epoch")
    assert "by epoch" not in caplog.text
    samples.make_trainer(tmp_path, save_strategy="epoch", gradient_accumulation_steps=2)
    assert "by epoch comes after several of them" in caplog.text


def test_resume_inside_accumulated_epochs_is_bit_identical(tmp_path):
    arguments = {"max_steps": 5, "gradient_accumulation_steps": 2}
    whole = samples.resumable(tmp_path / "whole", **arguments)
    whole.train()
    first = samples.resumable(tmp_path / "parts", **arguments)
    first.train()
    resumed = samples.resumable(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    theirs = samples.adapters(whole.model)
    for name, tensor in samples.adapters(resumed.model).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_deal_what_the_main_process_deals(tmp_path, persistent):
    arguments = {"max_steps": 7, "per_device_train_batch_size": 3}
    alone = questions_of_each_step(tmp_path / "alone", **arguments)
    workers = questions_of_each_step(
        tmp_path / "workers",
        dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
        **arguments,
    )
    assert workers == alone
    dealt = {ids for step in alone for _, retain in step for ids in retain}
    assert len(dealt) == len(samples.RETAIN)


def test_dropping_the_last_batch_must_leave_one(tmp_path):
    arguments = {"dataloader_drop_last": True, "max_steps": 2}
    kept = questions_of_each_step(tmp_path, per_device_train_batch_size=4, **arguments)
    assert [len(step) for step in kept] == [4, 4]
    with pytest.raises(ValueError, match="drop_last leaves no batch of 8 out of 5"):
        samples.make_trainer(tmp_path, per_device_train_batch_size=8, **arguments).train()


CHECKPOINT = (
    "model.safetensors",
    "reference_nll.json",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state.pth",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder with checkpoint-4 and checkpoint-8, and its adapters."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = samples.resumable(folder)
    trainer.train()
    return folder, samples.adapters(trainer.model)


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(trainer, message, checkpoint=True):
    before = contents(Path(trainer.args.output_dir))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert contents(Path(trainer.args.output_dir)) == before


def test_resume_compares_what_it_was_trained_on(stopped):
    trainer = samples.resumable(stopped)
    data = trainer.train_dataset
    for name, change, message in [
        ("retain", data.retain[:-1], "the retain set changed"),
        ("safe", data.safe[::-1], "the safe targets changed"),
        ("forget", data.forget[::-1], "the forget set changed"),
        ("seed", 5, "the order changed"),
        ("retain_per_forget", 1, "the order changed"),
        ("ref_nll", [1.0], "another base model or forget set"),
        ("ref_nll", [float("nan")] * 5, "another base model or forget set"),
    ]:
        own = getattr(data, name)
        setattr(data, name, change)
        refuses(trainer, message)
        setattr(data, name, own)
    weight = trainer.model.base_model.layers[1].mlp.up_proj.weight.data
    weight[3, 5] += 1e-4  # too little for any answer's NLL
    refuses(trainer, "the base model's weights changed")


def test_resume_compares_the_retain_bases(tmp_path, tokenizer):
    def trainer(seed):
        model = samples.make_llama(tokenizer, **samples.SIZES)
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(32, 4))[0]
        names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
        nk.swap_linears(model, names, rank=2, alpha=4, subspaces=dict.fromkeys(names, basis))
        return samples.make_trainer(
            tmp_path, model=model, max_steps=1, save_strategy="steps", save_steps=1
        )

    trainer(0).train()
    refuses(trainer(1), "the retain bases changed")
    trainer(0).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "scheduler.pt"])
def test_resume_notices_a_file_of_another_checkpoint(stopped, name):
    """As a copy has that was taken while they were written; each file can be read."""
    shutil.copy(stopped / "checkpoint-4" / name, stopped / "checkpoint-8" / name)
    match = rf"checkpoint-8/{name} is damaged .*not the file that was saved.*checkpoint-4 is whole"
    with pytest.raises(ValueError, match=match):
        samples.resumable(stopped, max_steps=10).train(resume_from_checkpoint=True)
    (stopped / "checkpoint-8" / SUMS).unlink()  # of an earlier version
    samples.resumable(stopped, max_steps=10).train(resume_from_checkpoint=True)


def test_resume_compares_the_config_of_the_base(stopped):
    trainer = samples.resumable(stopped, max_steps=10)
    trainer.model.config.rms_norm_eps *= 1000
    with pytest.raises(ValueError, match="the base model's config changed"):
        trainer.train(resume_from_checkpoint=True)


def test_resume_needs_every_file_whole(stopped):
    """The message names the file and the older checkpoint that can be used instead."""
    trainer = samples.resumable(stopped)
    remedy = "checkpoint-4 is whole: remove checkpoint-8"
    for name in CHECKPOINT:
        path = stopped / "checkpoint-8" / name
        data = path.read_bytes()
        path.unlink()
        refuses(trainer, rf"checkpoint-8 holds no {name}\. {remedy}")
        path.write_bytes(data[: len(data) // 2])
        refuses(trainer, rf"checkpoint-8/{name} is damaged .*{remedy}")
        path.write_bytes(b"\0" * len(data))
        refuses(trainer, rf"checkpoint-8/{name} is damaged .*{remedy}")
        if path.suffix in (".pt", ".pth"):  # one bit of what it stores
            path.write_bytes(data)
            with zipfile.ZipFile(path) as archive:
                stored = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
            middle = data.index(stored) + len(stored) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
            refuses(trainer, rf"checkpoint-8/{name} is damaged .*{remedy}")
        path.write_bytes(data)
    (stopped / "checkpoint-4" / "optimizer.pt").unlink()
    (stopped / "checkpoint-8" / "optimizer.pt").unlink()
    refuses(trainer, "No earlier checkpoint beside it is whole; start a new run")


def test_odd_contents_of_a_checkpoint_are_named(stopped):
    trainer = samples.resumable(stopped, max_steps=9)
    for name, odd in {
        "reference_nll.json": ["null", '{"a": 1}', '["x"]', "[" * 100_000],
        "trainer_state.json": ["null", "[]", '{"global_step": "x"}', '{"a": ' * 100_000],
        "rng_state.pth": [{}, [1], {"python": 1}],
        "scheduler.pt": [[1], None],
        "optimizer.pt": [{}, None, {"state": {}, "param_groups": []}],
    }.items():
        path = stopped / "checkpoint-8" / name
        data = path.read_bytes()
        for content in odd:
            if isinstance(content, str):
                path.write_text(content)
            else:
                torch.save(content, path)
            refuses(trainer, rf"{name}.* is damaged")
        path.write_bytes(data)


def test_odd_values_in_a_checkpoint_are_named(stopped):
    """Of the right form for a reader, and yet of no use for the steps that follow."""
    trainer = samples.resumable(stopped, max_steps=9)
    folder = stopped / "checkpoint-8"
    state = json.loads((folder / "trainer_state.json").read_text())
    optimizer = torch.load(folder / "optimizer.pt")
    groups = [{k: v for k, v in g.items() if k != "betas"} for g in optimizer["param_groups"]]
    schedule = torch.load(folder / "scheduler.pt")
    weights = load_file(folder / "model.safetensors")
    for name, content in [
        ("trainer_state.json", state | {"global_step": 7}),
        ("trainer_state.json", state | {"total_flos": "x"}),
        ("trainer_state.json", state | {"log_history": [{"step": 1, "retain": "x"}]}),
        ("optimizer.pt", optimizer | {"param_groups": groups}),
        ("optimizer.pt", optimizer | {"state": optimizer["state"] | {0: {"step": 8}}}),
        ("scheduler.pt", schedule | {"last_epoch": "x"}),
        ("scheduler.pt", schedule | {"base_lrs": [float("nan")]}),
        ("model.safetensors", {k: torch.full_like(v, torch.nan) for k, v in weights.items()}),
        ("model.safetensors", {k: v.long() for k, v in weights.items()}),
    ]:
        path = folder / name
        data = path.read_bytes()
        if path.suffix == ".json":
            path.write_text(json.dumps(content))
        elif path.suffix == ".safetensors":
            save_file(content, path)
        else:
            torch.save(content, path)
        refuses(trainer, rf"{name}.* is damaged")
        path.write_bytes(data)


def test_the_older_checkpoint_leads_to_the_same_end(finished, stopped):
    shutil.rmtree(stopped / "checkpoint-8")
    trainer = samples.resumable(stopped)
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in samples.adapters(trainer.model).items():
        assert torch.equal(tensor, finished[1][name]), name


def test_rotation_goes_by_step_when_the_clock_was_set_back(tmp_path):
    class SetClockBack(samples.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            path = tmp_path / f"checkpoint-{state.global_step}"
            os.utime(path, (4e9 - state.global_step * 1e6,) * 2)

    trainer = samples.resumable(tmp_path, save_total_limit=1)
    trainer.add_callback(SetClockBack())
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_rotation_deletes_what_was_left_before_and_no_copies(tmp_path):
    names = ["checkpoint-2", "checkpoint-10", "checkpoint-30", "checkpoint-10-copy", "checkpoint-x"]
    for name in names:
        (tmp_path / name).mkdir()
    rotate(tmp_path, None, tmp_path / "checkpoint-10", None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2, tmp_path / "checkpoint-10", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[:2], *names[3:]])
    rotate(tmp_path, 1, tmp_path / "checkpoint-10", str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_full_disk_says_how_to_go_on_from_the_command_line(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = samples.make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"no earlier one\. .*nsru train --resume true"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        RunFolder(tmp_path).log_metrics({"step": 1})


@pytest.mark.parametrize(
    "line",
    [
        b"\x80\x02}q\x00.",
        b"{\x00\x00",
        b"[1]",
        b"5",
        b'{"loss": 1}',
        b'{"step": "a"}',
        b"step,loss",
    ],
)
def test_metrics_that_are_no_rows_are_named_and_kept(tmp_path, line):
    run = RunFolder(tmp_path)
    run.log_metrics({"step": 1})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step": 2, "sa\n' + line + b"\n")
    before = run.metrics_path.read_bytes()
    for read in (run.read_metrics, lambda: run.drop_metrics_after(1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:3: expected a row"):
            read()
    assert run.metrics_path.read_bytes() == before


def ended_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write_lock(folder, pid, host=None):
    folder.mkdir(exist_ok=True)
    owner = {"pid": pid, "host": host or socket.gethostname()}
    (folder / ".lock").write_text(json.dumps(owner))


def test_a_second_run_in_a_folder_is_refused(tmp_path, stopped):
    for pid, host in ((os.getppid(), None), (ended_process(), "elsewhere")):
        write_lock(tmp_path, pid, host)
        with pytest.raises(ValueError, match=rf"in use by process {pid} on .*\.lock"):
            RunFolder(tmp_path).lock()
        write_lock(stopped, pid, host)
        refuses(samples.resumable(stopped), "in use by process")
    (tmp_path / ".lock").write_text("")
    with pytest.raises(ValueError, match="does not say which process"):
        RunFolder(tmp_path).lock()


@pytest.mark.parametrize("pid", ["ended", "own"])  # a container gives the same number again
def test_a_stale_lock_is_taken_over_with_a_message(tmp_path, caplog, pid):
    pid = ended_process() if pid == "ended" else os.getpid()
    write_lock(tmp_path, pid)
    with caplog.at_level(logging.WARNING):
        run = RunFolder(tmp_path).lock()
    assert f"over from process {pid} on {socket.gethostname()}" in caplog.text
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    run.unlock()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_lasts_as_long_as_its_run(tmp_path):
    run = RunFolder(tmp_path).lock()
    RunFolder(tmp_path).lock().unlock()  # the trainer inside nsru train
    if (child := os.fork()) == 0:
        run.unlock()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    del run
    assert not (tmp_path / ".lock").exists()
    seen = []

    class Look(samples.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((tmp_path / ".lock").exists())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        samples.make_trainer(tmp_path, trainer={"callbacks": [Look()]}).train()
    assert seen == [True]
    assert not (tmp_path / ".lock").exists()


def test_the_next_start_removes_what_a_kill_left(tmp_path):
    left = [".subspaces.0123abcd/x.safetensors", ".partial/checkpoint-4/model.safetensors",
            "adapter/.adapter_model.safetensors.deadbeef", ".results.json.00000000",
            "adapters/a/.nsru.json.0123abcd", "runs/npo-1-0/adapter/.a.json.01234567"]  # fmt: skip
    kept = [".notes", ".git/config", "adapter/adapter_model.safetensors", "a.0123abcd",
            "own/.notes.0123abcd"]  # fmt: skip
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    RunFolder(tmp_path).lock().unlock()
    assert {str(path.relative_to(tmp_path)) for path in contents(tmp_path)} == set(kept)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_without_a_gap(tmp_path, monkeypatch, can_exchange):
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr(files, "_exchange", lambda *_: False)
            elif text == "new":

                def watched(source, destination, replace=os.replace):
                    replace(source, destination)
                    assert folder.exists()

                patch.setattr(files.os, "replace", watched)
            with files.whole_folder(folder) as staged:
                (staged / "file").write_text(text)
        assert (folder / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_only_the_first_process_of_a_run_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunFolder(tmp_path).lock()
    run.write_config({})
    run.write_environment()
    run.write_results({})
    run.log_metrics({"step": 1})
    run.drop_metrics_after(0)
    assert list(tmp_path.iterdir()) == []


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(loading, "default_device", lambda: torch.device("cuda"))
    assert loading._device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert loading._device("auto") == torch.device("cuda", 3)
    monkeypatch.setattr(loading, "default_device", lambda: torch.device("cpu"))
    assert loading._device("auto") == torch.device("cpu")


def test_processes_look_for_unused_parameters_only_where_some_may_be(tmp_path, tokenizer):
    trainer = samples.make_trainer(tmp_path)
    model, data = trainer.model, trainer.train_dataset
    assert _all_take_part(model, data)
    model.base_model.norm.weight.requires_grad_(True)
    assert not _all_take_part(model, data)
    model.base_model.norm.weight.requires_grad_(False)
    model.base_model.layers[1].mlp.forward = lambda x: x  # as an expert that a router passes over
    assert not _all_take_part(model, data)


def save_tiny_sets(folder):
    samples.save_tiny(folder / "model", samples.RECORDS)
    for name, records in (("forget", samples.FORGET), ("retain", samples.RETAIN)):
        save_records(folder / f"{name}.jsonl", records)


TINY = (
    *("train", "--model.path", "model"),
    *("--data.forget", "forget.jsonl", "--data.retain", "retain.jsonl"),
    *("--train.batch_size", "2", "--train.save_steps", "2"),
    *("--subspace.rank", "4", "--subspace.width", "16"),
)


def test_under_torchrun_the_first_process_writes_and_prints(tmp_path, monkeypatch, capsys):
    save_tiny_sets(tmp_path)
    printed, silent = samples.torchrun(tmp_path, *TINY, "--out", "run", "--train.steps", "2")
    assert "next: nsru eval run" in printed
    assert silent == ""
    assert not list((tmp_path / "run").rglob(".*"))
    assert len(RunFolder(tmp_path / "run").read_metrics()) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = [encode_qa(tokenizer, qa.question, qa.answer) for qa in samples.RETAIN]
    streamed = {row["tokens"] for row in RunFolder(tmp_path / "run").read_results()["subspaces"]}
    assert streamed == {sum(map(len, pairs))}, "every token by one process"
    checkpoint = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert checkpoint == {*CHECKPOINT[:-1], "rng_state_0.pth", "rng_state_1.pth", SUMS}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main([*TINY, "--out", "run", "--train.steps", "2", "--resume=true"])
    assert "written by 2 processes, and this run has 1; resume" in capsys.readouterr().err
    printed, silent = samples.torchrun(tmp_path, "eval", "run", "--generate=false")
    assert "next: nsru verify run" in printed
    assert silent == ""


@pytest.mark.slow
def test_fsdp2_trains_evaluates_saves_and_resumes_as_ddp(tmp_path):
    """Of accelerate's launcher only the environment that it sets counts."""
    save_tiny_sets(tmp_path)
    arguments = (*TINY, "--train.steps", "4", "--train.eval_steps", "2", "--subspace.own_texts=3")
    printed, _ = samples.torchrun(tmp_path, *arguments, "--out", "ddp")
    fsdp = {
        "script": [str(Path(__file__).with_name("fsdp2.py"))],
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # accelerate's own default
    }
    sharded, silent = samples.torchrun(tmp_path, *arguments, "--out", "fsdp2", **fsdp)
    assert silent == ""
    asked = re.compile(r"safe answers to \d+ of 16 requests.*\n")
    not_asked = "ordinary requests were not asked: the model is sharded."
    assert not_asked in sharded
    assert sharded.replace(f"{not_asked}\n", "") == asked.sub("", printed).replace("ddp", "fsdp2")
    runs = [RunFolder(tmp_path / name) for name in ("ddp", "fsdp2")]
    assert_same_run(*runs)
    files = [{path.name for path in (run.path / "checkpoint-2").iterdir()} for run in runs]
    assert files[0] == files[1]
    shutil.rmtree(tmp_path / "fsdp2" / "checkpoint-4")
    printed, _ = samples.torchrun(tmp_path, *arguments, "--out", "fsdp2", "--resume=true", **fsdp)
    assert "going on from fsdp2/checkpoint-2" in printed
    assert_same_run(*runs)


FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
use_cpu: true
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
"""


@pytest.mark.slow
def test_accelerate_launch_with_an_fsdp2_configuration(tmp_path):
    """On a CPU accelerate itself leaves FSDP aside and trains by DDP; fsdp2.py makes it shard."""
    save_tiny_sets(tmp_path)
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    scripts = {
        "ddp": ["-m", "nsru_train.cli"],
        "fsdp2": [str(Path(__file__).with_name("fsdp2.py"))],
    }
    for name, script in scripts.items():
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=fsdp2.yaml"]
        done = subprocess.run(
            [*launch, *script, *TINY, "--out", name, "--train.steps=2"],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"next: nsru eval {name}" in done.stdout
    assert_same_run(*(RunFolder(tmp_path / name) for name in scripts))


def assert_same_run(run, other):
    """But for times and rounding."""
    rows, wanted = other.read_metrics(), run.read_metrics()
    assert len(rows) == len(wanted)
    for row, expected in zip(rows, wanted, strict=True):
        own = {name: value for name, value in expected.items() if "second" not in name}
        assert {name: row[name] for name in own} == pytest.approx(own, rel=1e-3, abs=1e-6)
    found, expected = other.read_results(), run.read_results()
    for one, two in zip(found["methods"], expected["methods"], strict=True):
        assert one["forget_prob"] == pytest.approx(two["forget_prob"], rel=1e-4)
    assert len(found["leakage"]) == 14
    tensors, wanted = (load_file(r.adapter_dir / "adapter_model.safetensors") for r in (other, run))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-5)
    sidecars = [json.loads((r.adapter_dir / "nsru.json").read_text()) for r in (run, other)]
    assert sidecars[0]["fingerprint"] == sidecars[1]["fingerprint"]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("command", ["demo", "subspace", "train", "eval", "merge", "verify"])
def test_only_training_and_evaluation_take_several_processes(monkeypatch, command, rank):
    """The others end at once, and the first one does not wait for them."""
    ran = []
    monkeypatch.setitem(cli.COMMANDS, command, lambda: ran.append(os.environ.get("WORLD_SIZE")))
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    cli.main([command])
    assert ran == (["2"] if command in ("train", "eval") else [None] if rank == "0" else [])


def test_a_digest_reads_the_parts_of_a_tensor_that_has_no_entries_of_its_own():
    """As torchao's quantised weights are."""
    from torch.testing._internal.two_tensor import TwoTensor

    class Opaque(TwoTensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args, kwargs):
            if function is torch.ops.aten.detach.default:
                return Opaque(args[0].a, args[0].b)
            raise NotImplementedError(function)

    one, other = torch.randn(3), torch.randn(3)
    of_opaque = digest([("w", Opaque(one, other))])
    assert of_opaque == digest([("w.a", one), ("w.b", other)])
    assert of_opaque != digest([("w", Opaque(one, one))])
