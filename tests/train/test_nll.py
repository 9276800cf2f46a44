"""Chunked NLL and KL of the head: values, gradients, memory, and agreement with whole models."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
)

from nsru_train.losses import head
from nsru_train.losses.nll import answer_nll, answer_states, token_kl, token_nll, token_score

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def inputs(tokens, dim, vocab, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(tokens * 1000 + dim * 10 + vocab)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return hidden, weight, offset if bias else None, targets


def full_logits(hidden, weight, bias, softcap, scale):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9),
    dim=st.integers(1, 6),
    vocab=st.integers(1, 12),
    chunk=st.integers(1, 10),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
)
def test_nll_and_every_gradient_equal_cross_entropy(
    tokens, dim, vocab, chunk, softcap, scale, bias
):
    hidden, weight, offset, targets = inputs(tokens, dim, vocab, bias=bias)
    leaves = [t.requires_grad_() for t in (hidden, weight, offset) if t is not None]
    upstream = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    ours = token_nll(
        hidden,
        weight,
        targets,
        head_bias=offset,
        chunk=chunk,
        logit_softcap=softcap,
        logit_scale=scale,
    )
    logits = full_logits(hidden, weight, offset, softcap, scale)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)])
def test_nll_gradients_for_subsets(trained):
    leaves = list(inputs(5, 4, 7)[:3])
    targets = inputs(5, 4, 7)[3]
    for i in trained:
        leaves[i].requires_grad_()

    def loss(*chosen):
        for i, tensor in zip(trained, chosen, strict=True):
            leaves[i] = tensor
        return token_nll(leaves[0], leaves[1], targets, head_bias=leaves[2], chunk=2)

    assert torch.autograd.gradcheck(loss, tuple(leaves[i] for i in trained))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_kl_value_and_gradient(softcap):
    hidden, weight, bias, _ = inputs(6, 4, 9)
    base = hidden.flip(0).contiguous()
    hidden.requires_grad_()
    options = {"head_bias": bias, "chunk": 4, "logit_softcap": softcap, "logit_scale": 0.5}
    ours = token_kl(base, hidden, weight, **options)
    log_q = full_logits(base, weight, bias, softcap, 0.5).log_softmax(-1)
    log_p = full_logits(hidden, weight, bias, softcap, 0.5).log_softmax(-1)
    torch.testing.assert_close(ours, (log_q.exp() * (log_q - log_p)).sum(-1))
    assert torch.autograd.gradcheck(lambda h: token_kl(base, h, weight, **options), hidden)
    assert token_kl(base, base, weight, **options).abs().max() < 1e-12


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_score_is_the_function_of_whole_logits(softcap):
    hidden, weight, bias, targets = inputs(6, 4, 9)
    base = hidden.flip(0).contiguous()
    hidden.requires_grad_()
    options = {"head_bias": bias, "chunk": 4, "logit_softcap": softcap, "logit_scale": 0.5}

    def score(z, y, z_base):
        return (z.sin() * z_base).sum(-1) + z.gather(-1, y.unsqueeze(-1)).squeeze(-1) ** 2

    def ours(h):
        return token_score(score, h, weight, targets, hidden_base=base, **options)

    logits, base_logits = (full_logits(h, weight, bias, softcap, 0.5) for h in (hidden, base))
    torch.testing.assert_close(ours(hidden), score(logits, targets, base_logits))
    assert torch.autograd.gradcheck(ours, hidden)
    with torch.no_grad():
        assert not ours(hidden).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_eager(dtype):
    hidden, weight, _, targets = inputs(64, 32, 301, dtype)
    weight = weight / 4
    exact = hidden.double().requires_grad_()
    torch.nn.functional.cross_entropy(
        exact @ weight.double().T, targets, reduction="sum"
    ).backward()
    results = {}
    for name in ("eager", "ours"):
        leaf = hidden.clone().requires_grad_()
        if name == "eager":
            logits = (leaf @ weight.T).float()
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        else:
            nll = token_nll(leaf, weight, targets, chunk=17)
            assert nll.dtype == torch.float32
            nll.sum().backward()
        assert leaf.grad.dtype == dtype
        results[name] = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert results["ours"] <= 2 * results["eager"] + 1e-6


class LargestTensor(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("op", ["nll", "kl"])
def test_no_tensor_of_tokens_times_vocabulary_exists(op):
    tokens, dim, vocab, chunk = 96, 8, 32_000, 16
    hidden, weight, _, targets = inputs(tokens, dim, vocab, torch.float32, bias=False)
    hidden.requires_grad_()
    with LargestTensor() as largest:
        if op == "nll":
            loss = token_nll(hidden, weight, targets, chunk=chunk)
        else:
            loss = token_kl(hidden.detach() + 1, hidden, weight, chunk=chunk)
        loss.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert chunk * vocab <= largest.numel < tokens * vocab / 4


def test_default_chunk_bounds_the_logits(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 1 << 16)
    hidden, weight, _, targets = inputs(96, 4, 8000, torch.float32, bias=False)
    with LargestTensor() as largest:
        token_nll(hidden, weight, targets)
    assert largest.numel == 8 * 8000


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma2_softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.2)
    ),
    "granite_divides": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere_multiplies": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
    "phi_head_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    ),
}


def make_model(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "phi_head_bias":
        torch.nn.init.normal_(model.lm_head.bias)
    return model.train()


def make_batch(vocabulary=97):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def expected_nll(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
    keep = labels != -100
    nll = torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none")
    return nll, keep.nonzero()[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_answer_nll_equals_the_models_own_logits(name, caplog):
    model, batch = make_model(name), make_batch()
    with caplog.at_level(logging.WARNING, "nsru_train"):
        nll, rows = answer_nll(model, batch)
    assert not caplog.records, "the chunked path must serve this model"
    expected, expected_rows = expected_nll(model, batch)
    assert rows.tolist() == expected_rows.tolist() == [0] * 8 + [1] * 5 + [2] * 2
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2_softcap", "granite_divides"])
def test_answer_nll_gradient(name):
    model, batch = make_model(name), make_batch()
    grads = []
    for nll in (answer_nll(model, batch)[0], expected_nll(model, batch)[0]):
        grads.append(torch.autograd.grad(nll.sum(), list(model.parameters())))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Doubled(LlamaForCausalLM):
    """Logits that no softcap or scale in the config explains."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output


@pytest.mark.parametrize("case", ["other_logits", "adapted_head"])
def test_unusual_heads_fall_back_to_full_logits_with_one_warning(case, caplog):
    torch.manual_seed(0)
    model = (Doubled if case == "other_logits" else LlamaForCausalLM)(LlamaConfig(**SIZES))
    if case == "adapted_head":

        class Adapted(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) + x.sum(-1, keepdim=True)

        model.lm_head.__class__ = Adapted
    batch = make_batch()
    with caplog.at_level(logging.WARNING, "nsru_train"):
        states = answer_states(model, batch)
        answer_nll(model, batch)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    torch.testing.assert_close(states.nll(), expected_nll(model, batch)[0])
    torch.testing.assert_close(states.kl(states), torch.zeros(len(states.rows)))
    assert len(states.select(states.rows == 1).nll()) == 5


def test_peft_model_is_scored_with_its_adapter():
    import peft

    model = make_model("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    batch = make_batch()
    nll, _ = answer_nll(model, batch)
    torch.testing.assert_close(nll, expected_nll(model, batch)[0], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (answer_nll(model, batch)[0] - nll).abs().max() > 1e-3


def test_bad_arguments_are_named():
    hidden, weight, bias, targets = inputs(4, 3, 5)
    for arguments, message in [
        ((hidden[None], weight, targets), r"hidden must be \[T, D\]"),
        ((hidden, weight.T, targets), r"head_weight must be \[V, D=3\]"),
        ((hidden, weight, targets[:2]), r"targets must be \[T=4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_nll(*arguments)
    with pytest.raises(TypeError, match="int64"):
        token_nll(hidden, weight, targets.float())
    with pytest.raises(ValueError, match=r"head_bias must be \[V=5\]"):
        token_nll(hidden, weight, targets, head_bias=bias[:2])
    with pytest.raises(ValueError, match="chunk"):
        token_nll(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="hidden_base"):
        token_kl(hidden[:2], hidden, weight)
    with pytest.raises(ValueError, match="frozen"):
        token_kl(hidden, hidden, weight.requires_grad_())
    with pytest.raises(ValueError, match="labels"):
        answer_nll(make_model("llama"), {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_a_head_behind_a_projection_of_another_width_gives_full_logits(caplog):
    config = RemBertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, input_embedding_size=12, output_embedding_size=24, is_decoder=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, batch = RemBertForCausalLM(config).eval(), make_batch()
    torch.testing.assert_close(answer_nll(model, batch)[0], expected_nll(model, batch)[0])
    assert "full logits are computed" in caplog.text


def test_a_part_of_the_vocabulary_that_is_masked_after_the_head_stays_masked(caplog):
    class Masking(LlamaForCausalLM):
        """As Chameleon, which never answers in tokens of images."""

        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits[..., 60:] = torch.finfo(output.logits.dtype).min
            return output

    plain, batch = make_model("llama"), make_batch(vocabulary=60)
    model = Masking(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    own = expected_nll(model, batch)[0]
    torch.testing.assert_close(answer_nll(model, batch)[0], own)
    assert (own - expected_nll(plain, batch)[0]).abs().max() > 1e-2
    assert "full logits are computed" in caplog.text


def test_a_hook_on_the_head_counts_from_when_it_is_there():
    model, batch = make_model("llama"), make_batch()
    before = answer_nll(model, batch)[0]
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    own = expected_nll(model, batch)[0]
    assert (own - before).abs().max() > 1e-2
    torch.testing.assert_close(answer_nll(model, batch)[0], own)
    handle.remove()
    torch.testing.assert_close(answer_nll(model, batch)[0], before)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 0.7 * forward(x)
    torch.testing.assert_close(answer_nll(model, batch)[0], expected_nll(model, batch)[0])
