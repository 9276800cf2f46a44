import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsru_train.data.encode import collate, encode_qa
from nsru_train.demo.authors import author_splits
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer
from nsru_train.scoring import quick_probabilities

RECORDS = author_splits(authors=3).retain
SMALL = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{qa.question}\n{qa.answer}" for qa in RECORDS], 400)


@pytest.fixture(scope="module")
def memorised(tokenizer):
    model = make_llama(tokenizer, **SMALL)
    stats = memorise(model, tokenizer, RECORDS, lr=5e-3, batch_size=4, progress=False)
    return model, stats


def test_tokenizer_is_reproducible_and_lossless(tokenizer):
    again = train_tokenizer((f"{qa.question}\n{qa.answer}" for qa in RECORDS), 400)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 400
    text = "Question: Ünïcode?\n\tyes  🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_tokenizer_needs_room_for_bytes():
    with pytest.raises(ValueError, match="at least 259, got 258"):
        train_tokenizer(["a"], 258)


def test_llama_has_grouped_queries_and_keeps_the_global_random_state(tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = make_llama(tokenizer, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features
    same, other = (make_llama(tokenizer, **SMALL, seed=seed) for seed in (0, 1))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(same.state_dict()[name], model.state_dict()[name])
    assert not torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_memorises(memorised):
    _, stats = memorised
    assert stats["reached"]
    assert stats["nll"] <= 0.01
    assert stats["probability"] >= 0.95
    assert stats["steps"] == stats["epochs"] * math.ceil(len(RECORDS) / 4)


def test_probability_is_that_of_the_model_s_own_loss(memorised, tokenizer):
    model, _ = memorised
    records = author_splits(authors=3).forget[:5]
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]
    with torch.no_grad():
        losses = [model(**collate([e], tokenizer.pad_token_id)).loss for e in encoded]
    expected = sum(math.exp(-loss.item()) for loss in losses) / len(losses)
    assert quick_probabilities(model, tokenizer, encoded) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.5


def test_greedy_generation_gives_the_answer(memorised, tokenizer):
    model, _ = memorised
    encoded = encode_qa(tokenizer, RECORDS[0].question, RECORDS[0].answer)
    prompt = torch.tensor([encoded.input_ids[: encoded.answer_start]])
    output = model.generate(prompt, max_new_tokens=60, do_sample=False)[0]
    assert output.tolist() == encoded.input_ids


def test_same_seed_same_weights(tokenizer):
    def train(seed):
        model = make_llama(tokenizer, **SMALL)
        stats = memorise(
            model, tokenizer, RECORDS, epochs=2, batch_size=8, seed=seed, progress=False
        )
        return stats, model.lm_head.weight

    (stats, first), (_, again), (_, other) = train(0), train(0), train(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not stats["reached"]
    assert stats["epochs"] == 2


def test_time_limit_stops_at_once_and_is_reported(tokenizer):
    model = make_llama(tokenizer, **SMALL)
    stats = memorise(model, tokenizer, RECORDS, max_seconds=0.0, progress=False)
    assert stats["steps"] == 1
    assert not stats["reached"]


def test_nothing_to_memorise_is_refused(tokenizer):
    with pytest.raises(ValueError, match="records is empty"):
        memorise(make_llama(tokenizer, **SMALL), tokenizer, [])


def test_saved_model_and_tokenizer_load_like_any_other(memorised, tokenizer, tmp_path):
    model, _ = memorised
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    qa = RECORDS[0]
    encoded = encode_qa(again, qa.question, qa.answer)
    assert encoded == encode_qa(tokenizer, qa.question, qa.answer)
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    batch = collate([encoded], again.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
