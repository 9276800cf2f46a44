"""The commands on a base in 4 or 8 bits: train, evaluate, merge, verify."""

import importlib.util
import json

import pytest
import torch
from samples import save_tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import nsru_kernels as nk
from nsru_train.cli import main
from nsru_train.config import ModelConfig
from nsru_train.demo.authors import author_splits
from nsru_train.loading import load_model
from nsru_train.quantized import dequantize, refuse_wrapped, requantization_errors
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Folder with a tiny model, and the options that name it and its sets."""
    folder = tmp_path_factory.mktemp("setting")
    splits = author_splits(authors=4, forget=1)
    records = (*splits.forget, *splits.retain)
    save_tiny(folder / "model", records, heads=2, kv_heads=1, hidden_size=64)
    for name in ("forget", "retain"):
        save_records(folder / f"{name}.jsonl", getattr(splits, name)[:6])
    return folder, [
        f"--model.path={folder / 'model'}",
        f"--data.forget={folder / 'forget.jsonl'}",
        f"--data.retain={folder / 'retain.jsonl'}",
        "--objective.w_suppress=1",
        "--objective.suppression=npo",  # the model knows nothing yet that unlikelihood could see
        "--train.steps=6",
        "--train.lr=0.02",
        "--train.batch_size=3",
    ]


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_the_commands(setting, bits, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, options = setting
    run = tmp_path / "run"
    main(["train", *options, f"--model.quantize={bits}", f"--out={run}"])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    main(["eval", str(run), "--max_new_tokens=4"])
    capsys.readouterr()
    main(["merge", str(run)])
    printed = capsys.readouterr().out
    assert f"The base is quantised; {run}/merged is in torch.float32." in printed
    assert "Quantised again it would be off by" in printed
    main(["verify", str(run)])
    assert "verify passed" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert all(weight.dtype == torch.float32 for weight in merged.parameters())
    base, _ = load_model(ModelConfig(str(folder / "model"), quantize=bits))
    nk.load_lora_adapter(base, run / "adapter")
    weights = dict(merged.named_parameters())
    for name, module in base.named_modules():
        if isinstance(module, nk.NSRULinear):
            wanted = weight_of(module.base_layer) + module.delta_weight()
            torch.testing.assert_close(weights[f"{name}.weight"], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_model_merged_from_python_is_saved_as_a_plain_one(setting, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    path = str(setting[0] / "model")
    base, tokenizer = load_model(ModelConfig(path, quantize=bits))
    plain, _ = load_model(path)
    report = nk.swap_linears(base, "all-linear", rank=2, alpha=4)
    assert report.frozen == sum(weight.numel() for weight in plain.parameters())
    ids = tokenizer("Who is it?", return_tensors="pt").input_ids
    nk.merge_adapters(base)
    wanted = base(input_ids=ids).logits
    base.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted)

    base, _ = load_model(ModelConfig(path, quantize=bits))
    nk.swap_linears(base, "q_proj", rank=2, alpha=4)
    nk.merge_adapters(base)
    assert base.config.quantization_config  # for what is left


def test_a_checkpoint_that_is_quantised_already(setting, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base, tokenizer = load_model(ModelConfig(str(setting[0] / "model"), quantize="nf4"))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantised already, by bitsandbytes, .* at none"):
        load_model(ModelConfig(str(tmp_path), quantize="int8"))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_layers_of_the_models_own_class_are_not_dequantised(setting):
    """They are not quantised, and their class reads them back."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base, _ = load_model(ModelConfig(str(setting[0] / "model"), quantize="nf4"))
    base.model.layers[0].mlp.up_proj = own = Doubled(64, 48)
    dequantize(base)
    assert base.model.layers[0].mlp.up_proj is own
    assert type(base.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.fixture
def other_base(setting, tmp_path):
    """Saves another kind of model beside the setting's tokenizer."""

    def save(kind, **sizes):
        tokenizer = AutoTokenizer.from_pretrained(setting[0] / "model")
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        options = [o for o in setting[1] if not o.startswith("--model.path")]
        return [*options, f"--model.path={tmp_path / kind}", "--model.quantize=nf4"]

    return save


def test_a_merged_gpt2_is_one_again(other_base, tmp_path, capsys):
    """bitsandbytes puts layers of its own in the place of Conv1D, which are the other way round."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = tmp_path / "run"
    main(["train", *other_base("gpt2", n_embd=64, n_layer=1, n_head=2), f"--out={run}"])
    main(["merge", str(run)])
    main(["verify", str(run)])
    assert "verify passed" in capsys.readouterr().out


def test_a_gpt2_that_was_merged_from_python_is_one_again(other_base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    other_base("gpt2", n_embd=64, n_layer=1, n_head=2)
    model, _ = load_model(ModelConfig(str(tmp_path / "gpt2"), quantize="int8"))
    names = ["c_attn", "c_fc", "mlp.c_proj", "attn.c_proj"]
    nk.swap_linears(model, names, rank=2, alpha=4)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B)
    nk.merge_adapters(model).eval()
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=model.dtype).eval()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_an_adapter_of_a_quantised_base_knows_it(setting, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, _ = setting

    def adapted(quantize):
        model, _ = load_model(ModelConfig(str(folder / "model"), quantize=quantize))
        return model

    model = adapted("int8")
    nk.swap_linears(model, ["q_proj"], rank=2, alpha=4)
    nk.save_lora_adapter(model, tmp_path / "adapter")
    nk.load_lora_adapter(adapted("int8"), tmp_path / "adapter")
    for quantize in ("none", "nf4"):
        with pytest.raises(ValueError, match="it was trained on weights with fingerprint"):
            nk.load_lora_adapter(adapted(quantize), tmp_path / "adapter")


def test_a_base_that_stays_as_it_was_is_refused(other_base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(SystemExit):
        main(["train", *other_base("falcon", **sizes), f"--out={tmp_path / 'run'}"])
    assert "so nothing is in nf4; leave it at none" in capsys.readouterr().err


def test_an_attack_on_a_run_on_a_quantised_base(setting, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = tmp_path / "run"
    main(["train", *setting[1], "--model.quantize=nf4", f"--out={run}"])
    main(["attack", str(run), "--attacks=[quantise,prefix]", "--max_new_tokens=4"])
    rows = json.loads((run / "attack" / "results.json").read_text())["attacks"]
    assert {"int8", "NF4"} <= {row["attack"] for row in rows}


def weight_of(module):
    from bitsandbytes import functional as bnb

    if (state := getattr(module.weight, "quant_state", None)) is not None:
        return bnb.dequantize_4bit(module.weight, state)
    scales_N = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # moves once
    return module.weight.float() * scales_N[:, None] / 127


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_what_quantising_again_loses(setting, bits):
    """All of an update far below the steps of the base, and less and less of one that grows."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, _ = load_model(ModelConfig(str(setting[0] / "model"), quantize=bits))
    nk.swap_linears(model, "q_proj", rank=2, alpha=4)
    assert requantization_errors(model) == {}  # no update yet
    errors = []
    for size in (1e-5, 1e-1):
        for module in model.modules():
            if isinstance(module, nk.NSRUWrappedLinear):
                torch.nn.init.constant_(module.lora_B, size)
        errors.append(requantization_errors(model))
    assert set(errors[0]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(len(errors[0]))}
    for name, lost in errors[0].items():
        assert 0.95 < lost < 1.2  # more than all: the scales of the blocks move too
        assert 0 < errors[1][name] < 0.8


def test_without_bitsandbytes_nothing_begins(setting, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    with pytest.raises(SystemExit):
        main(["train", *setting[1], "--model.quantize=nf4", f"--out={tmp_path / 'run'}"])
    refusal = capsys.readouterr().err
    assert "model.quantize: nf4 needs bitsandbytes: pip install bitsandbytes." in refusal


class Halved(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) / 2


def test_what_needs_the_weights_themselves_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Halved(8, 8))
    nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    with pytest.raises(ValueError, match="fila needs plain linear layers, and 1 is a Halved"):
        refuse_wrapped(model, "fila")
