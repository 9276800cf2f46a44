"""trl's trainers, as they are, on a swapped model and on one that constrain_peft confined."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import RECORDS, save_tiny

import nsru_kernels as nk
from nsru_kernels.nn.swap import match_linears
from nsru_train.config import ModelConfig
from nsru_train.loading import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"
REASON = "trl is not installed: pip install trl"
LEAST = 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model, tokenizer), both also in the folder that DPOTrainer reads its reference from."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = save_tiny(folder, RECORDS)
    model.config._name_or_path = str(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def bases(base):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.linalg.qr(torch.randn(linear.in_features, 6, generator=generator)).Q
        for name, linear in match_linears(base[0], "all-linear")
    }


def constrained(model, bases, **options):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and options.get("pretrained"):
            torch.nn.init.normal_(parameter, std=0.3)
    nk.constrain_peft(model, bases)
    return model


def swapped(model, bases):
    """With the adapters that `constrained` has."""
    like, result = constrained(model, bases).get_base_model(), copy.deepcopy(model)
    nk.swap_linears(result, "all-linear", rank=4, alpha=8, subspaces=bases)
    with torch.no_grad():
        for name in bases:
            a_RK = like.get_submodule(name).lora_A["default"].weight
            result.get_submodule(name).lora_A.copy_(a_RK)
    return result


def make_trainer(kind, model, tokenizer, folder, **options):
    trl = pytest.importorskip("trl", reason=REASON)
    from datasets import Dataset

    make, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[kind]
    rows = {
        "sft": [{"prompt": qa.question, "completion": f" {qa.answer}"} for qa in RECORDS],
        "dpo": [
            {"prompt": qa.question, "chosen": " I would rather not say.", "rejected": qa.answer}
            for qa in RECORDS
        ],
    }[kind]
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    args = config(str(folder), **settings | options)
    data = Dataset.from_list(rows)
    return make(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_confined(model, bases, adapter="default"):
    for name, basis in bases.items():
        a_RK = model.get_base_model().get_submodule(name).lora_A[adapter].weight
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_both_ways_train_alike(base, bases, tmp_path, kind):
    found = {}
    for make in (constrained, swapped):
        model = make(base[0], bases)
        trainer = make_trainer(kind, model, base[1], tmp_path / make.__name__)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        trainer.train()
        found[make] = losses(trainer)
        assert min(found[make]) < found[make][0], "something is learnt"
        for name, parameter in model.named_parameters():
            assert name not in frozen or torch.equal(parameter, frozen[name])
        if make is constrained:
            assert_confined(model, bases)
        else:
            nk.save_lora_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(*found.values(), rtol=1e-4, atol=1e-5)


def test_dpo_keeps_a_reference_of_an_adapter_that_was_trained(base, bases, tmp_path):
    model = constrained(base[0], bases, pretrained=True)
    start = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    trainer = make_trainer("dpo", model, base[1], tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3), "reference and policy begin alike"
    for name, parameter in start.items():
        assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), parameter)
    assert_confined(model, bases)
    assert_confined(model, bases, "ref")


@pytest.fixture
def quantised(base):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return load_model(ModelConfig(base[0].config._name_or_path, quantize="int8"))[0]


def test_adapters_of_a_quantised_base_are_confined_once_cast_back(quantised, base, bases, tmp_path):
    """As the guide says: TRL casts them to bf16, which rounds what is projected."""
    model = constrained(quantised, bases)
    trainer = make_trainer("sft", model, base[1], tmp_path)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for name, basis in bases.items():
        a_RK = tensors[f"base_model.model.{name}.lora_A.weight"].float()
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()


def test_a_swapped_quantised_base_is_refused(quantised, base, bases, tmp_path):
    nk.swap_linears(quantised, "all-linear", rank=4, alpha=8, subspaces=bases)
    with pytest.raises(ValueError, match="purely quantized models"):
        make_trainer("sft", quantised, base[1], tmp_path)


def test_sft_saves_and_resumes(base, bases, tmp_path):
    def train(**options):
        model = constrained(base[0], bases)
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer("sft", model, base[1], tmp_path, **settings)
        trainer.train(**options)
        return trainer

    straight = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(losses(resumed)[-2:], losses(straight)[-2:], rtol=1e-4, atol=1e-5)
    assert_confined(resumed.model, bases)
    resumed.save_model(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for name, basis in bases.items():
        a_RK = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()


def run_example(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / script))


def test_peft_example_forgets_and_retains(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    names = run_example(monkeypatch, "peft_lora.py", tmp_path)
    with torch.no_grad():
        assert names["loss"](names["forget"]) > 0.5
        assert names["loss"](names["retain"]) < 0.1
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("way", ["peft", "swap"])
def test_sft_example_forgets_and_retains(monkeypatch, tmp_path, way):
    pytest.importorskip("trl", reason=REASON)
    names = run_example(monkeypatch, "sft_trainer.py", way, tmp_path)
    assert names["after"]["eval_forget_loss"] > 0.5
    assert names["after"]["eval_retain_loss"] < 0.1
    assert (tmp_path / "adapter_model.safetensors").is_file()
