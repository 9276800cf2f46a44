"""min-k++ and gradient norms of a model, against autograd of the full logits."""

import pytest
import torch
from samples import FORGET, RETAIN, make_tokenizer

import nsru_kernels as nk
from nsru_train.data import encode_qa
from nsru_train.demo.tiny_model import make_llama
from nsru_train.membership import add_attack_scores


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows():
    return {
        name: [{"question": qa.question, "answer": qa.answer} for qa in records]
        for name, records in (("forget", FORGET[:2]), ("holdout", RETAIN[:2]), ("retain", RETAIN))
    }


def small(tokenizer):
    return make_llama(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=24)


def test_every_score_is_that_of_one_naive_pass(tokenizer):
    model = small(tokenizer)
    found = rows()
    alone = {"forget": found["forget"]}
    add_attack_scores(alone, model, tokenizer, progress=False)
    assert "gradnorm" not in alone["forget"][0]  # there is nothing to tell it from
    add_attack_scores(found, model, tokenizer, progress=False)
    assert "gradnorm" not in found["retain"][0]
    assert all(p.grad is None for p in model.parameters())
    for row in (*found["forget"], *found["holdout"]):
        encoded = encode_qa(tokenizer, row["question"], row["answer"])
        ids = torch.tensor(encoded.input_ids)
        places = range(encoded.answer_start, len(ids) - 1)  # without EOS
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        model.zero_grad()
        (-sum(log_p[t - 1, ids[t]] for t in places) / len(places)).backward()
        norms = [p.grad.norm() for p in model.parameters()]
        assert row["gradnorm"] == pytest.approx((sum(norms) / len(norms)).item(), rel=1e-5)
        standard = []
        for t in places:
            here = log_p[t - 1].detach()
            mean = (here.exp() * here).sum()
            deviation = ((here.exp() * here**2).sum() - mean**2).sqrt()
            standard.append(((here[ids[t]] - mean) / deviation).item())
        least = sorted(standard)[: max(1, int(0.4 * len(standard)))]
        assert row["min_k_plus_plus"] == pytest.approx(sum(least) / len(least), rel=1e-5)


def test_an_adapter_counts_where_it_is_merged(tokenizer):
    model = small(tokenizer)
    plain = rows()
    add_attack_scores(plain, model, tokenizer, progress=False)
    nk.swap_linears(model, "all-linear", rank=2, alpha=64.0)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            torch.nn.init.normal_(module.lora_B, std=0.5)
    adapted, merged = rows(), rows()
    add_attack_scores(adapted, model, tokenizer, gradients=False, progress=False)
    add_attack_scores(merged, nk.merge_adapters(model), tokenizer, progress=False)
    for before, unmerged, after in zip(
        *(r["forget"] for r in (plain, adapted, merged)), strict=True
    ):
        assert "gradnorm" not in unmerged
        assert unmerged["min_k_plus_plus"] == pytest.approx(after["min_k_plus_plus"], rel=1e-4)
        assert after["min_k_plus_plus"] != pytest.approx(before["min_k_plus_plus"], rel=1e-2)
        assert after["gradnorm"] != pytest.approx(before["gradnorm"], rel=1e-2)
