"""save_lora_adapter and load_lora_adapter: PEFT reads it; damage and full disks are survived."""

import copy
import errno
import json
import os
import re
import shutil

import pytest
import torch
from expert_cases import tiny_moe
from linear_cases import make_basis, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import nsru_kernels as nk
from nsru_kernels import files
from nsru_kernels.hf.peft_format import (
    CONFIG,
    SIDECAR,
    WEIGHTS,
    copy_lora_adapter,
    load_lora_adapter,
    read_adapter,
)
from nsru_kernels.nn.swap import match_linears

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama().eval()


@pytest.fixture
def base(llama):
    return copy.deepcopy(llama)


ids = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapt(model, targets=ALL, **options):
    """Swapped, with bases, and with adapters that change the logits."""
    subspaces = {
        n: make_basis(linear.in_features, 6).float() for n, linear in match_linears(model, targets)
    }
    nk.swap_linears(model, targets, **{"rank": 4, "alpha": 8, "subspaces": subspaces, **options})
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B, std=0.3)
    return model


def test_peft_alone_reads_it_and_gives_the_same_logits(base, llama, tmp_path):
    adapted = adapt(base)
    folder = nk.save_lora_adapter(adapted, tmp_path / "new" / "adapter")
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    assert (logits(adapted) - logits(llama)).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(logits(by_peft), logits(adapted), rtol=1e-5, atol=1e-6)
    merged = by_peft.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)
    ours = nk.merge_adapters(adapted)
    torch.testing.assert_close(logits(ours), logits(merged), rtol=1e-5, atol=1e-5)


def test_bf16_model_through_peft(base, llama, tmp_path):
    adapted = adapt(base.bfloat16(), ["q_proj", "down_proj"])
    nk.save_lora_adapter(adapted, tmp_path)
    plain = copy.deepcopy(llama).bfloat16()
    effect = (logits(adapted) - logits(plain)).abs().max()
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert (logits(by_peft) - logits(adapted)).abs().max() < 0.1 * effect


def test_files_and_their_contents(base, tmp_path):
    adapted = adapt(base, ["q_proj"], rank=4, alpha=10)
    nk.save_lora_adapter(adapted, tmp_path, metadata={"fingerprint": "abc"})
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG, SIDECAR}
    config, tensors = read_adapter(tmp_path)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 10, "LORA")
    assert config["task_type"] == "CAUSAL_LM"
    layer = adapted.model.layers[0].self_attn.q_proj
    stored = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(stored, layer.projected_adapter())
    assert (stored @ layer.basis).norm() / layer.lora_A.norm() <= 1e-6, "the basis is projected in"
    sidecar = json.loads((tmp_path / SIDECAR).read_text())
    assert sidecar["fingerprint"] == "abc"
    assert set(sidecar["leakage"]) == set(config["target_modules"])
    assert all(0 < leak <= 1e-6 for leak in sidecar["leakage"].values())


def test_a_model_that_reads_no_tokens_is_no_language_model_to_peft(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "vocab_size": 40, "num_mel_bins": 8, "max_source_positions": 8}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "bos_token_id": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 1}
    heard = {"input_features": torch.randn(1, 8, 16), "decoder_input_ids": torch.tensor([[1, 5]])}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes)).eval()
    plain = copy.deepcopy(model)
    nk.swap_linears(model, "fc1", rank=2, alpha=4)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B)
    nk.save_lora_adapter(model, tmp_path)
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(by_peft(**heard).logits, model(**heard).logits)


def test_the_weight_that_peft_keeps_beside_an_adapted_head(llama, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(llama)
    nk.load_lora_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    other = copy.deepcopy(llama)
    other.lm_head.weight.data.mul_(1.1)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is not the model's own"):
        nk.load_lora_adapter(other, tmp_path)


def test_adapters_that_no_gradient_reached_are_said(base, tmp_path, recwarn):
    adapted = adapt(base, ["q_proj"])
    nk.save_lora_adapter(adapted, tmp_path)
    assert not [w for w in recwarn if "adapters are zero" in str(w.message)]
    adapted.model.layers[0].self_attn.q_proj.lora_B.data.zero_()
    with pytest.warns(
        UserWarning, match=r"1 of 2 adapters are zero, .*layers\.0\.self_attn\.q_proj"
    ):
        nk.save_lora_adapter(adapted, tmp_path)


def test_no_leakage_is_told_where_no_subspace_is_known(base, tmp_path):
    nk.swap_linears(base, ["q_proj"], rank=4, alpha=8)
    nk.save_lora_adapter(base, tmp_path)
    assert json.loads((tmp_path / SIDECAR).read_text())["leakage"] == {}


def test_the_base_is_told_by_its_weights(base, llama, tmp_path):
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.up_proj.weight.data *= 1.5
    adapted = adapt(base, ["q_proj"])
    nk.save_lora_adapter(adapted, tmp_path)
    nk.load_lora_adapter(copy.deepcopy(llama).bfloat16(), tmp_path)
    with pytest.raises(ValueError, match="trained on weights with fingerprint"):
        nk.load_lora_adapter(other, tmp_path)
    adapted.lm_head.weight.requires_grad_()  # which the file does not hold
    with pytest.warns(UserWarning, match="beside the adapters"):
        nk.save_lora_adapter(adapted, tmp_path)
    assert "fingerprint" not in json.loads((tmp_path / SIDECAR).read_text())


def test_names_that_peft_changes_are_left_out():
    """Laguna's shared experts: a pattern of transformers fits their name by mistake."""
    laguna = pytest.importorskip("transformers.models.laguna")
    config = laguna.LagunaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_attention_heads_per_layer=[2], num_key_value_heads=1, head_dim=8,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=2,
        num_experts_per_tok=1, mlp_layer_types=["sparse"], layer_types=["full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    left = report.skipped["model.layers.0.mlp.shared_experts.up_proj"]
    assert "under another name" in left
    assert "model.layers.0.self_attn.q_proj" in report.swapped


def test_mixed_ranks_and_alphas_reach_peft(base, llama, tmp_path):
    adapted = adapt(base, ["q_proj", "up_proj"])
    name = "model.layers.1.mlp.up_proj"
    plain = llama.get_submodule(name)
    other = nk.NSRULinear.from_linear(copy.deepcopy(plain), 2, alpha=7)
    nn.init.normal_(other.lora_B)
    adapted.set_submodule(name, other)
    nk.save_lora_adapter(adapted, tmp_path)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    torch.testing.assert_close(logits(by_peft), logits(adapted), rtol=1e-5, atol=1e-6)
    by_us = copy.deepcopy(llama)
    load_lora_adapter(by_us, tmp_path)
    torch.testing.assert_close(logits(by_us), logits(adapted), rtol=1e-5, atol=1e-6)


def test_merge_adapters_in_bf16_sums_in_fp32(base):
    adapted = adapt(base.bfloat16())
    wanted = {
        n: (m.weight.float() + m.delta_weight()).bfloat16()
        for n, m in adapted.named_modules()
        if isinstance(m, nk.NSRULinear)
    }
    before = logits(adapted)
    nk.merge_adapters(adapted)
    for name, weight in wanted.items():
        assert torch.equal(adapted.get_submodule(name).weight, weight)
    assert (logits(adapted) - before).abs().max() < 0.1 * before.abs().max()


def test_load_gives_the_same_model_and_can_be_saved_again(base, llama, tmp_path):
    adapted = adapt(base)
    nk.save_lora_adapter(adapted, tmp_path / "a")
    again = copy.deepcopy(llama)
    report = load_lora_adapter(again, tmp_path / "a")
    assert len(report.swapped) == 14
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-5, atol=1e-6)
    nk.save_lora_adapter(again, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/name", "org/name"),
        ("/home/me/.cache/huggingface/hub/models--org--na--me/snapshots/0123abcd", "org/na--me"),
        ("/data/models/name", "/data/models/name"),
        ("", None),
    ],
)
def test_the_base_is_named_by_its_hub_id_where_there_is_one(base, tmp_path, name, said):
    base.config._name_or_path = name
    nk.save_lora_adapter(adapt(base, ["v_proj"], alpha=16.0), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == said
    assert (type(config["lora_alpha"]), config["lora_alpha"]) == (int, 16)


def test_an_alpha_of_each_module_goes_the_way_to_disk_and_back(base, llama, tmp_path):
    adapted = adapt(base, alpha_pattern={"model.layers.1.mlp.up_proj": 30.0})
    nk.save_lora_adapter(adapted, tmp_path)
    again = copy.deepcopy(llama)
    load_lora_adapter(again, tmp_path)
    assert again.model.layers[1].mlp.up_proj.alpha == 30.0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}  # which many servers would not read
    assert type(config["lora_alpha"]) is int
    further = adapt(copy.deepcopy(llama), alpha_pattern={"model.layers.1.mlp.up_proj": 30.0})
    copy_lora_adapter(further, tmp_path)
    torch.testing.assert_close(logits(further), logits(adapted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-5, atol=1e-6)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    torch.testing.assert_close(logits(by_peft), logits(adapted), rtol=1e-5, atol=1e-6)


def filled(model, **config):
    """A PEFT model whose B is not zero."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **config)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return wrapped


def test_adapters_of_parameters_are_read_as_peft_reads_them(llama, tmp_path):
    theirs = filled(
        copy.deepcopy(llama), target_modules=["v_proj"], target_parameters=["o_proj.weight"]
    )
    theirs.save_pretrained(tmp_path / "llama")
    own = copy.deepcopy(llama)
    load_lora_adapter(own, tmp_path / "llama")
    torch.testing.assert_close(logits(own), logits(theirs), rtol=1e-5, atol=1e-6)
    moe = tiny_moe("mixtral")
    theirs = filled(
        copy.deepcopy(moe), target_modules=["q_proj"], target_parameters=["gate.weight"]
    )
    theirs.save_pretrained(tmp_path / "moe")
    with pytest.raises(
        ValueError, match=r"target_parameters of a Mixtral.*Router, .*mlp\.gate: load"
    ):
        load_lora_adapter(moe, tmp_path / "moe")
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs = filled(
        copy.deepcopy(gpt2), target_modules=[], target_parameters=["attn.c_proj.weight"]
    )
    theirs.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"target_parameters of a Conv1D, .*attn\.c_proj: load it"):
        load_lora_adapter(gpt2, tmp_path / "gpt2")


def test_an_adapter_that_peft_wrote_loads(llama, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["v_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(llama)
    load_lora_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_saved(base, llama, tmp_path):
    with pytest.raises(ValueError, match=r"no NSRULinear; nothing to save"):
        nk.save_lora_adapter(llama, tmp_path / "a")
    adapted = adapt(base, ["q_proj"])
    layer = adapted.model.layers[1].self_attn.q_proj
    layer.merge()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is merged; call unmerge"):
        nk.save_lora_adapter(adapted, tmp_path / "a")
    layer.unmerge()
    with pytest.raises(TypeError, match=r"JSON"):
        nk.save_lora_adapter(adapted, tmp_path / "a", metadata={"model": llama})
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight holds NaN .*diverged"):
        nk.save_lora_adapter(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_what_is_trained_beside_the_adapters_is_said_to_be_left_out(base, tmp_path, name):
    adapt(base).get_parameter(name).requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"1 parameters beside the adapters .*{re.escape(name)}"):
        nk.save_lora_adapter(base, tmp_path)


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_leaves_the_previous_adapter_whole(base, tmp_path, monkeypatch, call, failing):
    """The disk may fill up at any of the three files; only a fourth would succeed."""
    adapted = adapt(base, ["q_proj"])
    nk.save_lora_adapter(adapted, tmp_path)
    before = contents(tmp_path)
    for module in adapted.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_A)
    count = 0

    def full():
        nonlocal count
        count += 1
        if count == failing + 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    fsync = os.fsync
    if call == "fsync":
        monkeypatch.setattr(files.os, "fsync", lambda handle: (full(), fsync(handle)))
    else:

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                full()
                return self.file.write(data)

        monkeypatch.setattr(
            files,
            "open",
            lambda *args: Full(open(*args)),  # noqa: SIM115
            raising=False,
        )
    if failing == 3:
        nk.save_lora_adapter(adapted, tmp_path)
        assert contents(tmp_path) != before
        return
    with pytest.raises(OSError, match=r"No space left on device; the previous file was kept"):
        nk.save_lora_adapter(adapted, tmp_path)
    assert contents(tmp_path) == before, "nothing changed and no temporary file is left"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS)


DAMAGE = {
    "truncated weights": (lambda f: truncate(f / WEIGHTS), "truncated or damaged.*Copy it again"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "truncated or damaged"),
    "truncated config": (lambda f: truncate(f / CONFIG), "truncated or damaged"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "truncated or damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "no folder": (shutil.rmtree, f"has no {CONFIG}"),
    "not LoRA": (edit_config(peft_type="IA3"), "'IA3', expected 'LORA'"),
    "DoRA": (edit_config(use_dora=True), "use_dora=True is not supported; load it with PEFT"),
    "bias": (edit_config(bias="all"), "trained biases are not supported"),
    "rank": (edit_config(r=5), f"has rank 4 .* 4 .*{CONFIG} says 5"),
    "missing tensor": (drop_tensor, "expected lora_A and lora_B of each module.*lora_A"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_named_and_the_model_left_alone(base, llama, tmp_path, case):
    damage, message = DAMAGE[case]
    folder = nk.save_lora_adapter(adapt(base, ["q_proj"]), tmp_path / "adapter")
    damage(folder)
    plain = copy.deepcopy(llama)
    with pytest.raises(ValueError, match=message):
        load_lora_adapter(plain, folder)
    assert not any(isinstance(m, nk.NSRULinear) for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters())


def test_a_setting_of_a_newer_peft_is_said(base, llama, tmp_path):
    folder = nk.save_lora_adapter(adapt(base, ["q_proj"]), tmp_path)
    edit_config(use_newvariant=True)(folder)
    with pytest.warns(UserWarning, match=r"has 'use_newvariant', which this version of PEFT"):
        load_lora_adapter(copy.deepcopy(llama), folder)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    folder = nk.save_lora_adapter(adapt(base, ["q_proj"]), tmp_path)
    narrow = tiny_llama(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(
        ValueError, match=r"made for a weight of \(32, 32\), the model has \(16, 16\)"
    ):
        load_lora_adapter(narrow, folder)
    with pytest.raises(ValueError, match=r"no module 'model.layers.0.*PeftModel.from_pretrained"):
        load_lora_adapter(nn.Sequential(nn.Linear(2, 2)), folder)
