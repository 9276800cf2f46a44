"""Texts sampled from the model itself, and the retain subspaces that hold them."""

import pytest
import torch
from samples import FORGET, RECORDS, RETAIN, make_model, make_tokenizer, save_tiny

import nsru_kernels as nk
from nsru_train import own_texts as module
from nsru_train.cli import main
from nsru_train.config import DataConfig, SubspaceConfig
from nsru_train.data.encode import request_end
from nsru_train.data.records import QA
from nsru_train.estimating import find_subspaces
from nsru_train.loading import Data
from nsru_train.own_texts import add_own_requests, own_requests, own_texts
from nsru_train.sources import save_records

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


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "assistant:"),
    ],
)
def test_where_a_request_ends_is_read_off_the_template(tokenizer, template, end):
    tokenizer.chat_template = template
    assert request_end(tokenizer) == end


def say(monkeypatch, tokenizer, turns, answers):
    """Let a model sample these turns, round by round, and answer a request by this."""
    tokenizer.chat_template = TEMPLATE
    rounds = iter(turns)

    def sample(model, tokenizer, count, *, new_tokens, seed, progress):
        opening = tokenizer("<user>", add_special_tokens=False).input_ids
        texts = [tokenizer(t, add_special_tokens=False).input_ids for t in next(rounds)]
        longest = max(map(len, texts))
        for ids in texts:
            row = opening + ids + [tokenizer.eos_token_id] * (longest - len(ids))
            yield {"input_ids": torch.tensor([row])}

    monkeypatch.setattr(module, "own_texts", sample)
    monkeypatch.setattr(
        module, "greedy_answers", lambda model, tokenizer, asked, **_: [answers[q] for q in asked]
    )


def test_own_requests_are_whole_and_each_once(monkeypatch, model, tokenizer):
    turns = [
        ["Where is a?</s><assistant>It", "where is A? </s>", "</s>Where", "Where is b?</s>"],
        ["Where is a?</s>", "Where is c?</s>", "Where is d?</s>", "Where is e?</s>"],
    ]
    long = "a b c d e f g h " * 12
    answers = dict(zip("abcde", ["In a.", long, "", "In d.", "In e."], strict=True))
    answers = {f"Where is {name}?": answer for name, answer in answers.items()}
    answers["where is A?"] = "In A."
    say(monkeypatch, tokenizer, turns, answers)
    found = own_requests(model, tokenizer, 2, progress=False)
    assert found == [QA("where is A?", "In A."), QA("Where is d?", "In d.")]


def test_own_requests_that_touch_the_forget_set_or_another_are_left_out(
    monkeypatch, model, tokenizer, tmp_path, caplog
):
    forget = [QA(f"Where was Marsk {i}?", f"In {i}.") for i in range(5)]
    retain, unseen = [QA("Where was Brede?", "Here.")], [QA("Where is Rome?", "There.")]
    data = Data(forget, retain, {"retain_unseen": unseen})
    asked = ["Who is Marsk?", "where is rome", "Where was it?", "Who was it?"]
    answers = dict(zip(asked, ["A man.", "There.", "There.", "It was Marsk."], strict=True))
    say(monkeypatch, tokenizer, [[f"{q}</s>" for q in asked]], answers)
    path, config = tmp_path / "own.jsonl", DataConfig("f", "r", own_requests=4)
    add_own_requests(model, tokenizer, data, config, path, keep=True, progress=False)
    assert data.own == [QA("Where was it?", "There.")]
    assert data.kept == [*retain, *data.own]
    assert data.splits()["retain"] == retain
    assert "data.own_requests: 1 of 4 could be used" in caplog.text
    again = Data(forget, retain, {"retain_unseen": unseen})
    add_own_requests(model, tokenizer, again, config, path, keep=True)  # without sampling
    assert again.own == data.own


def test_own_requests_need_a_chat_template(model, tokenizer):
    with pytest.raises(ValueError, match=r"data\.own_requests: no chat template.*leave it at 0"):
        own_requests(model, tokenizer, 2)


def test_own_requests_reach_subspaces_and_retain_loss(monkeypatch, tmp_path, without_figures):
    save_tiny(tmp_path / "model", RECORDS)
    seen = {}

    def stop(model, tokenizer, data, folder, **options):
        seen["kept"], seen["tokens"] = data.kept, options["subspaces"].inputs[0].tokens
        raise ValueError("enough")

    own = [QA("Where is it?", "Here.")]
    monkeypatch.setattr("nsru_train.train_run.unlearn", stop)
    monkeypatch.setattr(module, "own_requests", lambda *_, **__: own)
    for name, records in (("f", FORGET[:2]), ("r", RETAIN[:2])):
        save_records(tmp_path / f"{name}.jsonl", records)
    flags = [f"--model.path={tmp_path}/model", f"--data.forget={tmp_path}/f.jsonl"]
    flags += [f"--data.retain={tmp_path}/r.jsonl", "--subspace.rank=4", "--subspace.width=8"]
    tokens = []
    for count in (0, 1):
        out = tmp_path / f"run{count}"
        with pytest.raises(SystemExit):
            main(["train", *flags, f"--data.own_requests={count}", f"--out={out}"])
        tokens.append(seen["tokens"])
        assert seen["kept"] == [*RETAIN[:2], *own[:count]]
    assert tokens[1] > tokens[0]
