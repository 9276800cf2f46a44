"""Training and resuming under what users do to them: every fault has its right value here."""

import sys
from pathlib import Path

import pytest
import torch

import nsru_kernels as nk
from nsru_train.data.encode import collate, encode_qa
from nsru_train.losses.nll import answer_logits, answer_states

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
