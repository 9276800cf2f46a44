"""``import nsru_train``: every name is there and documented, and does what the command does."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import FORGET, RETAIN, SIZES, adapters, make_tokenizer

import nsru_kernels as nk
import nsru_train
from nsru_train.demo.tiny_model import make_llama

QUICK = {"steps": 4, "lr": 1e-2, "warmup": 0.0, "batch_size": 2, "save_steps": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_llama(tokenizer, **SIZES).eval()


def test_importing_is_light():
    code = (
        "import sys, nsru_train\n"
        "assert 'unlearn' in dir(nsru_train)\n"
        "assert not {'torch', 'numpy', 'transformers', 'nsru_kernels'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_that_of_its_module():
    tree = ast.parse(Path(nsru_train.__file__).read_text(encoding="utf-8"))
    imports = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nsru_train.")
        for alias in node.names
    ]
    assert sorted(name for _, name in imports) == sorted(nsru_train.__all__)
    for module, name in imports:
        assert getattr(nsru_train, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = nsru_train.unlern


def test_no_module_hides_a_name():
    """Importing a module sets it as an attribute of the package."""
    modules = {module.name for module in pkgutil.iter_modules(nsru_train.__path__)}
    assert modules.isdisjoint(nsru_train.__all__)


@pytest.mark.parametrize("name", nsru_train.__all__)
def test_every_parameter_is_documented(name):
    found = getattr(nsru_train, name)
    text = inspect.getdoc(found)
    sections = re.findall(r"^(?:Args|Attributes):\n((?: .*\n?|\n)+)", text, re.MULTILINE)
    documented = [key for part in sections for key in re.findall(r"^ {4}(\w+):", part, re.M)]
    parameters = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.kind != parameter.VAR_POSITIONAL
    ]
    assert sorted(documented) == sorted(parameters)


def test_the_trainer_alone_does_what_unlearn_does(model, tokenizer, tmp_path):
    from transformers import TrainingArguments

    subspaces = nsru_train.find_subspaces(
        model, tokenizer, FORGET, RETAIN, nsru_train.SubspaceConfig(rank=3), progress=False
    )
    other = make_llama(tokenizer, **SIZES).eval()
    torch.manual_seed(0)
    nk.swap_linears(
        other, "all-linear", rank=8, alpha=16, alpha_pattern=subspaces.alphas(16),
        subspaces=subspaces,
    )  # fmt: skip
    dataset = nsru_train.prepare_dataset(other, tokenizer, FORGET, RETAIN)
    arguments = TrainingArguments(
        str(tmp_path / "own"), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2,
        seed=0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    objective = nsru_train.Objective()
    nsru_train.NSRUTrainer(other, arguments, dataset, objective, tokenizer).train()

    outcome = nsru_train.unlearn(
        model, tokenizer, nsru_train.Data(FORGET, RETAIN), tmp_path / "unlearn",
        subspaces=subspaces, train=nsru_train.TrainConfig(**QUICK), progress=False,
    )  # fmt: skip
    assert max(row["leakage"] for row in outcome.leakage) < 1e-6
    found = adapters(model)
    for name, tensor in adapters(other).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)


def test_what_is_saved_is_loaded_back(model, tokenizer, tmp_path):
    base = make_llama(tokenizer, **SIZES)
    subspaces = nsru_train.find_subspaces(
        model, tokenizer, FORGET, RETAIN,
        nsru_train.SubspaceConfig(targets="q_proj", rank=3), progress=False,
    )  # fmt: skip
    outcome = nsru_train.unlearn(
        model, tokenizer, nsru_train.Data(FORGET, RETAIN), tmp_path, subspaces=subspaces,
        train=nsru_train.TrainConfig(**QUICK), progress=False,
    )  # fmt: skip
    assert outcome.swap.swapped == list(subspaces), "the layers that have a subspace"
    folder = nsru_train.save_adapter(model, tmp_path / "adapter")
    nsru_train.load_adapter(base, folder)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(base(**batch).logits, model(**batch).logits)
    another = make_llama(tokenizer, **SIZES, seed=1)
    with pytest.raises(ValueError, match="fingerprint"):
        nsru_train.load_adapter(another, folder)


def test_projection_without_subspaces_is_refused(model, tokenizer, tmp_path):
    data = nsru_train.Data(FORGET, RETAIN)
    with pytest.raises(ValueError, match="find_subspaces makes them"):
        nsru_train.unlearn(model, tokenizer, data, tmp_path)
    assert not any(isinstance(module, nk.NSRULinear) for module in model.modules())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((FORGET, FORGET), "share 5 of 5"),
        ((FORGET, []), "retain set is empty"),
        ((FORGET, RETAIN, {"retain_unseen": RETAIN}), "retain and retain_unseen sets share"),
    ],
)
def test_sets_are_checked(sets, message):
    with pytest.raises(ValueError, match=message):
        nsru_train.Data(*sets)


def test_a_model_is_loaded_by_its_folder(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded, found = nsru_train.load_model(str(tmp_path))
    assert not loaded.training
    assert found.text_format.end_tokens == {tokenizer.eos_token_id, 7}
