"""What the pipeline measures the subspaces on, and what it makes of their editability."""

import dataclasses
import math
import shutil
import threading

import numpy
import pytest
import torch
import transformers
from samples import FORGET, RETAIN, make_model, make_tokenizer

import nsru_kernels as nk
from nsru_train import pipeline
from nsru_train.config import LoraConfig, Objective, SubspaceConfig, TrainConfig
from nsru_train.data.encode import encode_qa
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.estimating import find_subspaces, token_batches
from nsru_train.loading import Data
from nsru_train.methods import METHODS
from nsru_train.pipeline import unlearn


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return nk.merge_adapters(make_model(tokenizer))


def _adapted(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)}


def test_answers_only_keeps_the_positions_that_predict_the_answer(model, tokenizer):
    sizes = {"max_tokens": 4096, "max_length": 64}
    (batch,) = token_batches(model, tokenizer, FORGET, answers_only=True, **sizes)
    assert "token_mask" not in token_batches(model, tokenizer, FORGET, **sizes)[0]
    predicted = sorted(
        batch["input_ids"][row, 1:][keep[:-1]].tolist()
        for row, keep in enumerate(batch["token_mask"])
    )
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in FORGET]
    assert predicted == sorted(item.input_ids[item.answer_start :] for item in encoded)
    assert not batch["token_mask"][:, -1].any(), "the last position predicts nothing"


def test_editability_is_that_of_answers(model, tokenizer):
    subspaces = find_subspaces(
        model, tokenizer, FORGET, RETAIN, SubspaceConfig(rank=3), progress=False
    )
    seen = []
    entry = subspaces.inputs[0]
    handle = model.get_submodule(entry.name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    for qa in FORGET:
        item = encode_qa(tokenizer, qa.question, qa.answer)
        with torch.no_grad():
            model(input_ids=torch.tensor([item.input_ids]))
        seen[-1] = seen[-1][0, item.answer_start - 1 : -1]
    handle.remove()
    x = torch.nn.functional.normalize(torch.cat(seen), dim=1)
    taken = (x @ subspaces[entry.name].basis).square().sum().item() / len(x)
    assert entry.editability == pytest.approx(1 - taken, abs=1e-5)


@pytest.mark.parametrize("project", [True, False])
def test_alpha_follows_editability_only_where_it_projects(model, tokenizer, tmp_path, project):
    subspaces = find_subspaces(
        model, tokenizer, FORGET, RETAIN, SubspaceConfig(rank=3), progress=False
    )
    unlearn(
        model, tokenizer, Data(FORGET, RETAIN, {}, SafeTargets.from_file()), tmp_path,
        targets="all-linear", subspaces=subspaces, lora=LoraConfig(project=project),
        objective=Objective(), train=TrainConfig(steps=1, batch_size=2, save_steps=0),
        progress=False,
    )  # fmt: skip
    adapted = _adapted(model)
    for entry in subspaces.inputs:
        assert 0 < entry.editability < 1
        want = 16 / math.sqrt(entry.editability) if project else 16
        assert all(adapted[name].alpha == pytest.approx(want) for name in entry.modules)


def test_subspaces_may_be_of_more_layers_than_are_trained(model, tokenizer, tmp_path):
    subspaces = find_subspaces(
        model, tokenizer, FORGET, RETAIN, SubspaceConfig(rank=3), progress=False
    )
    outcome = unlearn(
        model, tokenizer, Data(FORGET, RETAIN, {}, SafeTargets.from_file()), tmp_path,
        targets=["q_proj"], subspaces=subspaces, lora=LoraConfig(), objective=Objective(),
        train=TrainConfig(steps=1, batch_size=2, save_steps=0), progress=False,
    )  # fmt: skip
    assert {name.rpartition(".")[2] for name in outcome.swap.swapped} == {"q_proj"}


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_run_that_changed_nothing_says_so(model, tokenizer, tmp_path, caplog, warmup):
    unlearn(
        model, tokenizer, Data(FORGET, RETAIN, {}, SafeTargets.from_file()), tmp_path,
        targets=["q_proj"], subspaces=None, lora=LoraConfig(project=False), objective=Objective(),
        train=TrainConfig(steps=1, batch_size=2, save_steps=0, warmup=warmup), progress=False,
    )  # fmt: skip
    assert ("adapters are zero as before" in caplog.text) == bool(warmup)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_of_the_model_itself_is_told_of(model, tokenizer, tmp_path, caplog, p):
    model.model.layers[1].own_dropout = torch.nn.Dropout(p)
    data = Data(FORGET, RETAIN, {}, SafeTargets.from_file())
    unlearn(
        model, tokenizer, data, tmp_path, targets="q_proj", subspaces=None,
        lora=LoraConfig(rank=2, project=False), objective=Objective(),
        train=TrainConfig(steps=1, batch_size=2, save_steps=0), progress=False,
    )  # fmt: skip
    assert ("own 1 dropout layers (p up to 0.25)" in caplog.text) == (p > 0)


def test_rmu_trains_the_mlps_of_its_layers_in_their_null_spaces(model, tokenizer, tmp_path):
    subspaces = find_subspaces(
        model, tokenizer, FORGET, RETAIN, SubspaceConfig(rank=3), progress=False
    )
    outcome = unlearn(
        model, tokenizer, Data(FORGET, RETAIN, {}, SafeTargets.from_file()), tmp_path,
        targets="all-linear", subspaces=subspaces, lora=LoraConfig(), objective=METHODS["rmu"](),
        train=TrainConfig(steps=2, batch_size=2, save_steps=0), progress=False,
    )  # fmt: skip
    assert list(outcome.swap.swapped) == ["model.layers.0.mlp.down_proj"]
    assert all(row["leakage"] < 1e-6 for row in outcome.leakage)


@pytest.mark.parametrize(("world", "count", "warned"), [(1, 7, 0), (2, 8, 0), (2, 7, 1), (2, 4, 0)])
def test_questions_that_several_processes_use_twice_are_said(
    monkeypatch, caplog, world, count, warned
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    pipeline._warn_of_uneven(count, 2)
    assert len(caplog.records) == warned


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": METHODS["npo"]()}, "method was Objective"),
        ({"objective": Objective(w_retain=2.0)}, r"objective\.w_retain was 1\.0"),
        ({"lora": LoraConfig(project=False, alpha=8)}, r"lora\.alpha was 16\.0"),
        ({"lr": 1e-3}, r"train\.lr was 0\.01"),
        ({"steps": 6}, r"train\.steps was 4"),
        ({"weight_decay": 0.1}, r"train\.weight_decay was 0\.0"),
    ],
)
def test_a_run_is_resumed_with_its_settings_alone(tokenizer, tmp_path, changes, said):
    data = Data(FORGET, RETAIN, {}, SafeTargets.from_file())

    def run(resume, objective=None, lora=None, **train):
        model = nk.merge_adapters(make_model(tokenizer))
        settings = {"steps": 4, "batch_size": 2, "save_steps": 2, "lr": 1e-2, **train}
        unlearn(
            model, tokenizer, data, tmp_path, resume=resume, objective=objective,
            lora=lora or LoraConfig(project=False, alpha=16), train=TrainConfig(**settings),
            progress=False,
        )  # fmt: skip

    run(False)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; resume=True goes"):
        run(False)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=f"belongs to another run: {said}"):
        run(True, **changes)
    same = LoraConfig(project=False, alpha=16.0)
    run(
        True,
        lora=same,
        lr=numpy.float64(1e-2),
        lr_scheduler_type=transformers.SchedulerType.LINEAR,
        eval_steps=1,
    )
    assert (tmp_path / "checkpoint-4").is_dir()


@dataclasses.dataclass(frozen=True)
class WithClient(METHODS["npo"]):
    client: object = dataclasses.field(default_factory=threading.Lock)


def test_a_method_may_hold_what_cannot_be_copied(model, tokenizer, tmp_path):
    data = Data(FORGET, RETAIN, {}, SafeTargets.from_file())
    outcome = unlearn(
        model, tokenizer, data, tmp_path, objective=WithClient(), lora=LoraConfig(project=False),
        train=TrainConfig(steps=1, save_steps=1), progress=False,
    )  # fmt: skip
    assert (tmp_path / "checkpoint-1").is_dir()
    assert outcome


def test_a_precision_that_only_accelerate_knows_is_said(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for bf16 in (False, True):
        caplog.clear()
        unlearn(
            nk.merge_adapters(make_model(tokenizer)), tokenizer,
            Data(FORGET, RETAIN, {}, SafeTargets.from_file()), tmp_path / str(bf16),
            lora=LoraConfig(project=False), train=TrainConfig(steps=1, save_steps=0, bf16=bf16),
            progress=False,
        )  # fmt: skip
        assert ("train.bf16 is false, and accelerate trains in bf16" in caplog.text) != bf16


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"objective": METHODS["npo"]}, "objective must be a Method, got <class"),
        ({"lora": {"rank": 4}}, "lora must be a LoraConfig"),
        ({"train": "fast"}, "train must be a TrainConfig"),
    ],
)
def test_settings_of_another_type_are_named(model, tokenizer, tmp_path, odd, said):
    data = Data(FORGET, RETAIN, {}, SafeTargets.from_file())
    with pytest.raises(TypeError, match=f"unlearn: {said}"):
        unlearn(model, tokenizer, data, tmp_path, **odd)


def test_subspaces_that_are_read_leave_settings_without_effect(model, tokenizer, tmp_path, caplog):
    found = find_subspaces(model, tokenizer, FORGET, RETAIN, SubspaceConfig(rank=3), progress=False)
    found.save(tmp_path / "sets")
    again = find_subspaces(
        model, tokenizer, FORGET, RETAIN, SubspaceConfig(path=str(tmp_path / "sets"), rank=2)
    )
    assert {entry.rank for entry in again.inputs} == {3}
    assert "used as they are; subspace.rank has no effect" in caplog.text
