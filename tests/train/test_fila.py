"""FILA: the model begins as it was, and only the low-rank part of its weights is trained."""

import pytest
import samples
import torch

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import load_lora_adapter
from nsru_train.config import LoraConfig, TrainConfig
from nsru_train.data import SafeTargets
from nsru_train.demo.tiny_model import make_llama
from nsru_train.estimating import token_batches
from nsru_train.loading import Data
from nsru_train.losses.nll import answer_nll
from nsru_train.methods import METHODS
from nsru_train.methods.fila import EPSILON, low_rank_part, squared_gradients
from nsru_train.pipeline import unlearn

IDS = torch.tensor([[5, 9, 4, 8, 3]])
RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer()


def make_base(tokenizer):
    return make_llama(tokenizer, **samples.SIZES, seed=1)


def train(tokenizer, folder, *, project=False, subspaces=None, resume=False, **options):
    model = make_base(tokenizer)
    data = Data(samples.FORGET, samples.RETAIN, {}, SafeTargets.from_file())
    outcome = unlearn(
        model, tokenizer, data, folder, targets="all-linear", subspaces=subspaces,
        lora=LoraConfig(rank=RANK, alpha=ALPHA, project=project),
        objective=METHODS["ihl"](fila=True),
        train=TrainConfig(**{"steps": 2, "lr": 1e-2, "save_steps": 0, "batch_size": 2, **options}),
        resume=resume, progress=False,
    )  # fmt: skip
    return model, outcome


def adapters(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)}


def test_fisher_information_weighs_batches_by_their_tokens(tokenizer):
    model = make_base(tokenizer)
    batches = [
        token_batches(model, tokenizer, records, max_tokens=200, max_length=100)[0]
        for records in (samples.FORGET[:2], samples.FORGET[3:4])
    ]
    weight = model.model.layers[1].mlp.down_proj.weight
    expected, tokens = 0, 0
    for batch in batches:
        nll, _ = answer_nll(model, batch)
        (gradient,) = torch.autograd.grad(nll.mean(), weight)
        expected, tokens = expected + len(nll) * gradient**2, tokens + len(nll)
    weight.requires_grad_(False)
    found = squared_gradients(model, [weight, model.lm_head.weight], batches)
    torch.testing.assert_close(found[0], expected / tokens)
    assert not weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_the_part_is_the_best_of_its_rank_for_weighted_rows():
    torch.manual_seed(0)
    w, importance = torch.randn(12, 10), torch.rand(12) * 3 + 0.1
    a, b = low_rank_part(w, importance, 4, scaling=2.0)
    u, s, v = torch.linalg.svd(importance[:, None] * w, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4] / (importance + EPSILON)[:, None]
    torch.testing.assert_close(2.0 * b @ a, best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.norm(dim=1), (s[:4] / 2).sqrt(), rtol=1e-3, atol=1e-3)
    a, b = low_rank_part(w, importance, 11, scaling=2.0)  # one more than W has
    assert a.shape == (11, 10)
    torch.testing.assert_close(2.0 * b @ a, w, rtol=1e-3, atol=1e-3)


def test_training_starts_from_the_base_model_and_leaves_the_start_alone(tokenizer, tmp_path):
    begun, _ = train(tokenizer, tmp_path / "begun", steps=1, lr=0.0)
    trained, _ = train(tokenizer, tmp_path / "trained")
    base = make_base(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(begun(IDS).logits, base(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (trained(IDS).logits - base(IDS).logits).abs().max() > 1e-3
        with nk.adapters_disabled(trained):
            assert torch.equal(trained(IDS).logits, base(IDS).logits)
    for name, module in adapters(trained).items():
        first = adapters(begun)[name]
        assert (module.rank, module.scaling) == (2 * RANK, ALPHA / RANK)
        assert torch.equal(first.lora_A[:RANK], first.lora_A[RANK:])
        assert torch.equal(first.lora_B[:, :RANK], -first.lora_B[:, RANK:])
        assert torch.equal(module.lora_A[RANK:], first.lora_A[RANK:])
        assert torch.equal(module.lora_B[:, RANK:], first.lora_B[:, RANK:])
        assert not torch.equal(module.lora_A[:RANK], first.lora_A[:RANK])


def test_its_update_lies_in_the_null_space_and_is_plain_lora(tokenizer, tmp_path):
    base = make_base(tokenizer)
    batches = token_batches(base, tokenizer, samples.RETAIN, max_tokens=400, max_length=100)
    subspaces = nk.estimate_retain_subspaces(base, batches, "all-linear", width=16, rank=5)
    model, outcome = train(tokenizer, tmp_path / "run", project=True, subspaces=subspaces)
    assert 0 < max(row["leakage"] for row in outcome.leakage) < 1e-6
    nk.save_lora_adapter(model, tmp_path / "adapter")
    load_lora_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_goes_on(tokenizer, tmp_path):
    whole, _ = train(tokenizer, tmp_path / "whole", steps=4, lr_scheduler_type="constant")
    options = {"lr_scheduler_type": "constant", "save_steps": 2}
    train(tokenizer, tmp_path / "cut", steps=2, **options)
    resumed, _ = train(tokenizer, tmp_path / "cut", steps=4, resume=True, **options)
    for name, module in adapters(resumed).items():
        torch.testing.assert_close(module.lora_A, adapters(whole)[name].lora_A)
        torch.testing.assert_close(module.lora_B, adapters(whole)[name].lora_B)


def test_weight_decay_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"train\.weight_decay must be 0 .*got 0\.1"):
        train(tokenizer, tmp_path, weight_decay=0.1)
