"""Texts sampled from the model itself, and the retain subspaces that hold them."""

import pytest
import torch
from samples import FORGET, RETAIN, make_model, make_tokenizer

import nsru_kernels as nk
from nsru_train.config import SubspaceConfig
from nsru_train.own_texts import own_texts
from nsru_train.pipeline import find_subspaces

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return nk.merge_adapters(make_model(tokenizer))


def sample(model, tokenizer, count=5, **options):
    batches = own_texts(model, tokenizer, count, new_tokens=6, progress=False, **options)
    return [batch["input_ids"] for batch in batches]


def test_texts_begin_where_a_question_would_and_differ(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    (texts,) = sample(model, tokenizer)
    opening = tokenizer("<user>", add_special_tokens=False).input_ids
    assert texts.shape == (5, len(opening) + 6)
    assert all(row[: len(opening)] == opening for row in texts.tolist())
    assert len({tuple(row) for row in texts.tolist()}) == 5


@pytest.mark.parametrize("bos", [True, False])
def test_without_a_template_texts_begin_after_bos_or_eos(model, tokenizer, bos):
    if not bos:
        tokenizer.bos_token = None
    (texts,) = sample(model, tokenizer)
    assert texts.shape == (5, 7)
    first = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    assert set(texts[:, 0].tolist()) == {first}


def test_batches_do_not_repeat_each_other(model, tokenizer):
    batches = sample(model, tokenizer, batch_size=2)
    assert [len(texts) for texts in batches] == [2, 2, 1]
    assert len({tuple(row) for texts in batches for row in texts.tolist()}) == 5


def test_the_seed_decides_and_nothing_else_changes(model, tokenizer):
    config, state = model.generation_config, torch.get_rng_state()
    model.train()
    first, again, other = (sample(model, tokenizer, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is config
    assert model.training


def test_they_are_sampled_from_the_whole_distribution(model, tokenizer):
    """Neither the model's own top-k nor its end of text holds sampling back."""
    model.generation_config.top_k, model.generation_config.do_sample = 1, True
    logits = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    texts = torch.cat(sample(model, tokenizer, count=4000))
    counted = torch.bincount(texts[:, 1], minlength=len(logits)) / len(texts)
    # transformers' default, the 50 most likely tokens, leaves out a third of the mass here.
    assert (counted - logits.softmax(0)).abs().sum() < 0.25
    assert (texts[:, 1:-1] == tokenizer.eos_token_id).any(), "texts go on after an end"


def test_subspaces_hold_them_too(model, tokenizer):
    def estimate(count):
        config = SubspaceConfig(rank=3, own_texts=count)
        return find_subspaces(model, tokenizer, FORGET, RETAIN, config, progress=False)

    without, with_them = estimate(0), estimate(4)
    (texts,) = own_texts(model, tokenizer, 4, progress=False)
    assert with_them.inputs[0].tokens == without.inputs[0].tokens + texts["input_ids"].numel()
    name = with_them.inputs[0].name
    assert not torch.allclose(with_them[name].basis, without[name].basis, atol=1e-3)


def test_a_position_table_that_is_too_short_is_said(tokenizer):
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, ffn_dim=16,
        num_attention_heads=2, max_position_embeddings=20, word_embed_proj_dim=16,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"own texts take 129 tokens.*20 positions"):
        next(own_texts(model, tokenizer, 1, progress=False))


def test_a_negative_number_of_texts_is_refused():
    with pytest.raises(ValueError, match=r"subspace.own_texts must be 0 .*got -1"):
        SubspaceConfig(own_texts=-1)
