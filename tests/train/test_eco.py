"""ECO: prompts found by a classifier, corrupted on their way in, and the rest left bit by bit."""

import json
import math

import pytest
import samples
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import nsru_kernels as nk
from nsru_train import guard as guard_module
from nsru_train.answering import greedy_answers
from nsru_train.cli import main
from nsru_train.data.encode import collate, encode_prompt, encode_qa, find_question
from nsru_train.demo.authors import author_splits
from nsru_train.guard import EcoGuard, without_update
from nsru_train.methods import METHODS
from nsru_train.methods.eco import search
from nsru_train.prompt_classifier import (
    PENALTY,
    PromptClassifier,
    choose_threshold,
    fit_logistic,
    mean_states,
)
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")

AUTHORS = author_splits(authors=6, forget=2)
ASKED, KEPT = ([qa.question for qa in part] for part in (AUTHORS.forget, AUTHORS.retain))
# Of all lengths, and every other one to be forgotten.
MIXED = [pick(part, key=len) for pick in (min, max) for part in (KEPT, ASKED)]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Known:
    """Flags the questions that it is told."""

    threshold, encoder = 0.0, None

    def __init__(self, *questions):
        self.questions = questions
        self.read = []

    def log_odds(self, model, tokenizer, questions):
        self.read += questions
        return torch.tensor([1.0 if q in self.questions else -1.0 for q in questions])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model, _ = samples.save_tiny(folder, (*AUTHORS.forget, *AUTHORS.retain), heads=2, kv_heads=1)
    model.get_output_embeddings().weight.data.mul_(20)  # so that it says something definite
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer((*AUTHORS.forget, *AUTHORS.retain), 400)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter that changes a lot."""
    adapted = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    nk.swap_linears(adapted, "all-linear", rank=2, alpha=8)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return nk.save_lora_adapter(adapted, tmp_path_factory.mktemp("adapter"))


def padded(tokenizer, prompts, side):
    width = max(map(len, prompts))
    rows = [[tokenizer.pad_token_id] * (width - len(p)) for p in prompts]
    masks = [[0] * len(pad) + [1] * len(p) for pad, p in zip(rows, prompts, strict=True)]
    ids = [pad + p if side == "left" else p + pad for pad, p in zip(rows, prompts, strict=True)]
    masks = masks if side == "left" else [mask[::-1] for mask in masks]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def seen(model, **inputs):
    """Embeddings as the layers get them, and logits."""
    found = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *a: found.append(a[2]))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        handle.remove()
    return found[-1], logits


# The classifier.


def test_the_classifier_flags_the_right_prompts(model, tokenizer):
    classifier = PromptClassifier.fit(model, tokenizer, ASKED, KEPT, layer=0)
    counts = classifier.held_out
    assert counts["forget"] == round(len(ASKED) / 4)
    assert counts["retain"] == round(len(KEPT) / 4)
    assert counts["flagged"] == 0
    odds = classifier.log_odds(model, tokenizer, [*ASKED, *KEPT])
    flagged = odds > classifier.threshold
    assert flagged[: len(ASKED)].float().mean() > 0.8
    assert not flagged[len(ASKED) :].any()
    again = PromptClassifier.fit(model, tokenizer, ASKED, KEPT, layer=0)
    assert torch.equal(again.weight, classifier.weight)
    other = PromptClassifier.fit(model, tokenizer, ASKED, KEPT, layer=0, seed=1)
    assert not torch.equal(other.weight, classifier.weight)


def test_mean_states_are_means_over_tokens_of_a_layer(model, tokenizer):
    states = mean_states((model, tokenizer), ASKED[:3], 1)
    for question, state in zip(ASKED[:3], states, strict=True):
        with torch.no_grad():
            inputs = tokenizer(question, return_tensors="pt")
            # The last entry of hidden_states is behind the final norm.
            layers = model.model.layers
            got = []
            handle = layers[1].register_forward_hook(lambda m, a, out, got=got: got.append(out))
            model(input_ids=inputs["input_ids"])
            handle.remove()
        out = got[0] if isinstance(got[0], torch.Tensor) else got[0][0]
        torch.testing.assert_close(state, out[0].double().mean(0), atol=1e-6, rtol=1e-5)


def test_logistic_regression_weighs_both_classes_alike():
    positive, negative = torch.ones(1, 1).double(), -torch.ones(3, 1).double()
    weight, bias = fit_logistic(positive, negative)
    # By symmetry the odds are even at 0; where the gradient is 0, σ(-w) = penalty · w · variance.
    w = weight.item()
    assert bias == pytest.approx(0, abs=1e-5)
    assert 1 / (1 + math.exp(w)) == pytest.approx(PENALTY * w * 0.75, rel=1e-4)


@pytest.mark.parametrize(
    ("forget", "retain", "threshold"),
    [
        ([3, 5], [-1, 1], 2),  # apart: midway
        ([0, 4], [1, 2], 3),  # no retain prompt is flagged, though a forget prompt is missed
        ([0, 1], [-1, 2], -0.5),  # not possible: the fewest, and then none is missed
    ],
)
def test_threshold(forget, retain, threshold):
    forget, retain = torch.tensor(forget).double(), torch.tensor(retain).double()
    assert choose_threshold(forget, retain) == threshold


def test_a_classifier_that_tells_nothing_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="give another layer, a sentence encoder"):
        choose_threshold(torch.tensor([-3.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"data\.forget: .* two questions or more.* got 1"):
        PromptClassifier.fit(model, tokenizer, ASKED[:1], KEPT)
    with pytest.raises(ValueError, match=r"one of 2 decoder layers, from 0, got 2"):
        PromptClassifier.fit(model, tokenizer, ASKED, KEPT, layer=2)


def test_a_sentence_encoder_reads_instead(model, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    method = METHODS["eco"](classifier=str(tmp_path / "encoder"), sigma=1.0)
    noted = []
    attached = method.make_guard(
        model, tokenizer, ASKED, KEPT, seed=0, measure=lambda: 0.5,
        note=lambda *args: noted.append(args),
    )  # fmt: skip
    assert noted == [(1, 0.5)]
    attached.remove()
    attached.guard.save(tmp_path / "guard")
    found = EcoGuard.load(tmp_path / "guard")
    assert found.classifier.weight.shape == (16,)
    odds = [g.classifier.log_odds(model, tokenizer, KEPT) for g in (attached.guard, found)]
    torch.testing.assert_close(*odds, atol=0, rtol=0)
    (tmp_path / "guard" / "encoder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the sentence encoder in"):
        EcoGuard.load(tmp_path / "guard")


# Which tokens are read.


@pytest.mark.parametrize("template", [None, CHAT])
def test_the_question_of_a_prompt_is_found(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompt = encode_prompt(tokenizer, "Who is  Ann?")
    whole = encode_qa(tokenizer, "Who is  Ann?", "Ann is a poet.").input_ids
    assert find_question(tokenizer, prompt) == ("Who is  Ann?", len(prompt))
    assert find_question(tokenizer, whole) == ("Who is  Ann?", len(prompt))
    free = tokenizer("Tell me of Ann.")["input_ids"]
    assert find_question(tokenizer, free) == ("Tell me of Ann.", len(free))


def test_a_conversation_is_read_to_its_last_question(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", "Who is Ann?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    question, length = find_question(tokenizer, ids)
    assert question.startswith("Hello.")
    assert question.endswith("Who is Ann?")
    assert length == len(ids)


# The corruption.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("corruption", ["rand_noise", "zero_out", "flip_sign"])
def test_corruption_is_of_flagged_rows_alone(model, tokenizer, side, corruption):
    questions = MIXED
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    assert len({*map(len, prompts)}) > 1
    inputs = padded(tokenizer, prompts, side)
    plain, logits = seen(model, **inputs)
    with EcoGuard(Known(*ASKED), corruption, 2.0).attach(model, tokenizer):
        embeddings, found = seen(model, **inputs)
        again, _ = seen(model, **padded(tokenizer, prompts[1:2], side))
    expected = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row in (1, 3):
        expected[row, inputs["attention_mask"][row].nonzero()[:-1]] = True
    assert torch.equal((embeddings != plain).all(2), expected)
    assert torch.equal((embeddings != plain).any(2), expected)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert not torch.allclose(found[[1, 3], -1], logits[[1, 3], -1])
    kept = inputs["attention_mask"][1].bool()
    assert torch.equal(embeddings[1, kept], again[0]), "alike in every batch"
    torch.testing.assert_close(seen(model, **inputs)[1], logits, atol=0, rtol=0)
    # As by hand.
    if corruption == "zero_out":
        by_hand = plain.masked_fill(expected.unsqueeze(2), 0)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            wanted = model(inputs_embeds=by_hand, attention_mask=mask).logits
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("corrupt_answers", [False, True])
def test_answers_are_corrupted_in_scores_only_where_asked_for(model, tokenizer, corrupt_answers):
    records = [AUTHORS.forget[0], AUTHORS.retain[0]]
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]
    batch = collate(encoded, tokenizer.pad_token_id)
    batch.pop("labels")
    plain, _ = seen(model, **batch)
    guard = EcoGuard(Known(*ASKED), "flip_sign", corrupt_answers=corrupt_answers)
    with guard.attach(model, tokenizer):
        embeddings, _ = seen(model, **batch)
    changed = (embeddings != plain).any(2)
    end = len(encoded[0]) if corrupt_answers else encoded[0].answer_start
    assert changed[0].nonzero().flatten().tolist() == list(range(end - 1))
    assert not changed[1].any()


def test_decoding_is_left_alone(model, tokenizer):
    inputs = padded(tokenizer, [encode_prompt(tokenizer, q) for q in (ASKED[0], KEPT[0])], "left")
    step = torch.tensor([[5], [6]])
    plain = model.get_input_embeddings()(step)
    classifier = Known(*ASKED)
    with EcoGuard(classifier, "zero_out").attach(model, tokenizer), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        embeddings, _ = seen(model, input_ids=step, attention_mask=mask, past_key_values=cache)
    assert torch.equal(embeddings, plain)
    assert sorted(classifier.read) == sorted(["Who?", ASKED[0], KEPT[0]]), "each question once"


def test_a_prompt_in_pieces_is_refused(model, tokenizer):
    inputs = padded(tokenizer, [encode_prompt(tokenizer, q) for q in (ASKED[0], KEPT[0])], "left")
    inputs["attention_mask"][0, 0] = 0
    options = {"max_new_tokens": 2, "pad_token_id": 0}
    with EcoGuard(Known(*ASKED), "zero_out").attach(model, tokenizer):
        with torch.no_grad():
            begun = model(inputs["input_ids"][:, :3], use_cache=True).past_key_values
        for pieces in ({"prefill_chunk_size": 4}, {"past_key_values": begun}):
            with pytest.raises(ValueError, match="on top of a KV cache"):
                model.generate(**inputs, **options, **pieces)
        with pytest.raises(ValueError, match="generate without cache_implementation"):
            model.generate(**inputs, **options, cache_implementation="static")
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] = "):
            model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, 1:])


def test_answers_of_a_mixed_batch(model, tokenizer):
    questions = [MIXED[1], MIXED[0], MIXED[3], MIXED[2]]
    ask = {"max_new_tokens": 8}
    plain = greedy_answers(model, tokenizer, questions, **ask)
    with EcoGuard(Known(*ASKED), "rand_noise", 3.0).attach(model, tokenizer):
        found = greedy_answers(model, tokenizer, questions, **ask)
        alone = [greedy_answers(model, tokenizer, [q], **ask)[0] for q in questions]
        with without_update(model):
            assert greedy_answers(model, tokenizer, questions, **ask) == plain
    assert found[1::2] == plain[1::2]
    assert found[::2] != plain[::2]
    assert found == alone


def test_what_is_corrupted_by_hand():
    x = torch.tensor([[1.0, -4.0, 2.0], [-3.0, 0.5, 2.0]])

    def corrupted(**options):
        return EcoGuard(Known(), **options).corrupt(x, "Who?").tolist()

    assert corrupted(corruption="flip_sign", dims=2) == [[-1, 4, 2], [3, -0.5, 2]]
    assert corrupted(corruption="zero_out", dims=1, select="top") == [[1, 0, 2], [0, 0.5, 2]]
    assert corrupted(corruption="zero_out") == [[0, 0, 0], [0, 0, 0]]
    noise = EcoGuard(Known(), "rand_noise", 5.0, dims=2).corrupt(torch.zeros(4000, 3), "Who?")
    assert not noise[:, 2].any()
    assert noise[:, :2].std().item() == pytest.approx(5, rel=0.05)
    assert noise[:, :2].mean().item() == pytest.approx(0, abs=0.3)
    draws = [
        EcoGuard(Known(), "rand_noise", seed=seed).corrupt(x, question)
        for seed, question in ((0, "Who?"), (0, "Who?"), (1, "Who?"), (0, "Why?"))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_embeddings_in_place_of_tokens_are_refused(model, tokenizer):
    with EcoGuard(Known()).attach(model, tokenizer):
        with pytest.raises(ValueError, match="the model got no input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(ValueError, match=r"the model has one already; remove\(\) it"):
            EcoGuard(Known()).attach(model, tokenizer)


# The search.


def test_search_is_the_published_recursion():
    asked = []

    def f(sigma):
        asked.append(sigma)
        return max(1 - sigma / 8, 0.5)

    found = list(search(f, 0.1, 20.0, 3, 0.2))
    # ε = .0999: f falls by .1998/8 over 2ε, a slope of -1/8; then it is flat.
    assert asked == pytest.approx([0.1999, 1e-4, 2.6999, 2.5001, 5.1999])
    assert [sigma for sigma, _ in found] == asked[::2]
    assert [value for _, value in found] == pytest.approx([0.9750125, 0.6625125, 0.5])
    asked.clear()
    assert len(list(search(f, 0.1, 20.0, 9, 0.7))) == 2
    assert len(asked) == 3, "it ends at the target"


def test_search_never_goes_below_its_start():
    rising = list(search(lambda sigma: sigma, 0.5, 10.0, 3, 0.0))
    assert [sigma for sigma, _ in rising] == pytest.approx([0.9995] * 3)
    # The lower point is clipped to 1e-8, the divisor stays 2ε: a slope of -8.001 / 1.998.
    clipped = [sigma for sigma, _ in search(lambda sigma: sigma, 1e-9, 1.0, 2, 0.0)]
    assert clipped == [pytest.approx(1.999e-9), pytest.approx(8.001 / 1.998)]


@pytest.mark.parametrize("target", [0.1, 0.7])
def test_the_guard_gets_the_strength_that_was_measured(model, tokenizer, target, caplog):
    method = METHODS["eco"](target=target, search_steps=3)
    values, tried = iter([0.9, 0.95, 0.6, 0.7, 0.65]), []
    attached = method.make_guard(
        model, tokenizer, ASKED, KEPT, seed=0, measure=lambda: next(values),
        note=lambda step, value, sigma: tried.append((step, value, sigma)),
    )  # fmt: skip
    assert tried[1][:2] == (2, 0.6)
    assert attached.guard.sigma == tried[1][2] > tried[0][2]
    assert len(tried) == (3 if target == 0.1 else 2)
    assert ("no sigma came below objective.target" in caplog.text) == (target == 0.1)


# The folder.


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    classifier = PromptClassifier.fit(model, tokenizer, ASKED, KEPT, layer=0)
    guard = EcoGuard(classifier, "rand_noise", 1.5, dims=7, select="top", seed=4)
    guard.fingerprint = guard_module.fingerprint_weights(model)
    return guard, guard.save(tmp_path / "guard")


def test_save_and_load(model, tokenizer, saved):
    guard, path = saved
    found = EcoGuard.load(path)
    assert torch.equal(found.classifier.weight, guard.classifier.weight)
    found.classifier.weight = guard.classifier.weight
    assert found == guard
    assert sorted(file.name for file in path.iterdir()) == ["classifier.safetensors", "config.json"]
    answers = []
    for one in (guard, EcoGuard.load(path)):
        with one.attach(model, tokenizer):
            answers.append(greedy_answers(model, tokenizer, ASKED, max_new_tokens=6))
    assert answers[0] == answers[1]


def edit(part, **values):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (config[part] if part else config).update(values)
        (path / "config.json").write_text(json.dumps(config))

    return change


def weigh(weight, name="weight"):
    return lambda path: save_file({name: weight}, path / "classifier.safetensors")


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"has no config\.json; expected a folder"),
        (cut("config.json"), r"config\.json is truncated or damaged"),
        (cut("classifier.safetensors"), "truncated or damaged, no whole safetensors"),
        (weigh(torch.full((32,), math.nan).double()), "vector of finite float64"),
        (weigh(torch.zeros(32)), r"vector of finite float64, got \(32,\) torch.float32"),
        (weigh(torch.zeros(2, 16).double()), "vector of finite float64"),
        (weigh(torch.zeros(32).double(), "w"), "vector of finite float64"),
        (edit("", schema=2), "schema must be 1, got 2"),
        (edit("guard", sigma=math.nan), "sigma must be float and finite, got nan"),
        (edit("guard", sigma=-1.0), r"guard\.sigma must not be negative, got -1"),
        (edit("guard", seed=2**32), r"guard\.seed must be from 0"),
        (edit("guard", dims=0), r"guard\.dims must be ≥ 1, got 0"),
        (edit("guard", select="last"), r"guard\.select must be one of \('first', 'top'\)"),
        (edit("guard", corruption="reverse"), r"guard\.corruption must be one of"),
        (edit("guard", adapter="/etc"), "multiple values for keyword argument 'adapter'"),
        (edit("guard", paths=[]), "unexpected keyword argument 'paths'"),
        (edit("classifier", bias=math.inf), "bias must be float and finite"),
        (edit("classifier", layer=None), "either a layer or an encoder"),
        (edit("classifier", held_out={"forget": 0.5}), "held_out must be"),
        (edit("classifier", encoder="/etc"), "multiple values for keyword argument 'encoder'"),
    ],
)
def test_damaged_folders_are_refused(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(ValueError, match=message):
        EcoGuard.load(path)


def test_a_guard_of_another_model_is_refused(model, tokenizer, saved):
    guard, path = saved
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    weight.data.mul_(1.1)
    with pytest.raises(ValueError, match="it was made for weights with fingerprint"):
        guard.attach(model, tokenizer)
    weight.data.copy_(before)
    edit("guard", fingerprint=None)(path)
    weigh(torch.zeros(31).double())(path)
    with pytest.raises(ValueError, match="has 31 weights, hidden states 32 entries"):
        EcoGuard.load(path).attach(model, tokenizer)
    edit("classifier", layer=2)(path)
    with pytest.raises(ValueError, match="one of 2 decoder layers, from 0, got 2"):
        EcoGuard.load(path).attach(model, tokenizer)
    assert not model._forward_pre_hooks
    assert not model.base_model._forward_pre_hooks


def test_a_failed_save_keeps_what_was_there(saved, monkeypatch):
    guard, path = saved
    guard.sigma = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        guard.save(path)
    assert EcoGuard.load(path).sigma == 1.5


# With an adapter.


def test_flagged_rows_get_the_adapter(model, folder, tokenizer, adapter):
    questions = MIXED
    inputs = padded(tokenizer, [encode_prompt(tokenizer, q) for q in questions], "left")
    adapted = AutoModelForCausalLM.from_pretrained(folder).eval()
    nk.load_lora_adapter(adapted, adapter)
    plain, wanted = (seen(one, **inputs)[1] for one in (model, adapted))
    assert not torch.allclose(plain, wanted)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    attached = EcoGuard(Known(*ASKED), None, adapter=adapter).attach(model, tokenizer)
    mixed = seen(model, **inputs)[1]
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], wanted[[1, 3]], atol=1e-5, rtol=1e-4)
    for rows, expected in (([0, 2], plain), ([1, 3], wanted)):
        some = {name: value[rows] for name, value in inputs.items()}
        torch.testing.assert_close(seen(model, **some)[1], expected[rows], atol=1e-5, rtol=1e-4)
    linear, used = model.model.layers[0].mlp.up_proj, []
    linear.register_forward_pre_hook(lambda module, _: used.append(module.enabled))
    for rows in ([0, 2], [0, 1]):
        seen(model, **{name: value[rows] for name, value in inputs.items()})
    assert used == [False, True], "adapters do not run where no row is flagged"
    say = {"max_new_tokens": 8}
    answers = [greedy_answers(one, tokenizer, questions, **say) for one in (adapted, model)]
    with without_update(model):
        assert torch.equal(seen(model, **inputs)[1], plain)
        base = greedy_answers(model, tokenizer, questions, **say)
    assert answers[1] == [base[0], answers[0][1], base[2], answers[0][3]]
    assert base[1] != answers[0][1]
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="3 rows go on after 4 prompts"):
        model(input_ids=torch.zeros(3, 1, dtype=torch.long), past_key_values=cache)
    attached.remove()
    assert not [m for m in model.modules() if isinstance(m, nk.NSRULinear)]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(seen(model, **inputs)[1], plain)


def test_answers_in_turn_go_on_as_their_own_prompts_began(model, tokenizer, adapter):
    def last(caches):
        token = torch.tensor([[5]])
        return [model(token, past_key_values=cache).logits[0, 0] for cache in caches]

    prompts = [torch.tensor([encode_prompt(tokenizer, q)]) for q in (ASKED[0], KEPT[0])]
    guard = EcoGuard(Known(*ASKED), None, adapter=adapter)
    with torch.no_grad(), guard.attach(model, tokenizer):
        alone = [last([model(ids, use_cache=True).past_key_values])[0] for ids in prompts]
        caches = [model(ids, use_cache=True).past_key_values for ids in prompts]
        for found, wanted in zip(last(caches), alone, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        plain = last([model(prompts[0], use_cache=True).past_key_values])[0]
    assert not torch.allclose(alone[0], plain, atol=1e-3), "the adapter acts"


def test_a_prompt_of_one_token_is_one(model, tokenizer, adapter):
    bos = torch.tensor([[1]])
    with torch.no_grad(), EcoGuard(Known(*ASKED), None, adapter=adapter).attach(model, tokenizer):
        plain = model(bos).logits
        seen(model, **padded(tokenizer, [encode_prompt(tokenizer, ASKED[0])], "left"))
        assert torch.equal(model(bos).logits, plain)


def test_adapter_and_corruption_go_together(model, tokenizer, adapter, tmp_path):
    guard = EcoGuard(Known(*ASKED), "flip_sign", adapter=adapter)
    inputs = padded(tokenizer, [encode_prompt(tokenizer, q) for q in (ASKED[0], KEPT[0])], "right")
    plain, logits = seen(model, **inputs)
    with guard.attach(model, tokenizer):
        embeddings, found = seen(model, **inputs)
    assert (embeddings != plain).any(2).any(1).tolist() == [True, False]
    assert torch.equal(found[1], logits[1])
    guard.classifier = PromptClassifier.fit(model, tokenizer, ASKED, KEPT)
    loaded = EcoGuard.load(guard.save(tmp_path / "guard"))
    assert loaded.adapter == tmp_path / "guard" / "adapter"
    with loaded.attach(model, tokenizer):
        assert [m for m in model.modules() if isinstance(m, nk.NSRULinear)]
    (loaded.adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        loaded.attach(model, tokenizer)
    torch.testing.assert_close(seen(model, **inputs)[1], logits, atol=0, rtol=0)


def test_rows_that_cannot_be_told_apart_are_refused(model, tokenizer, adapter):
    prompts = [encode_prompt(tokenizer, q) for q in (ASKED[0], KEPT[0])]
    linear = model.model.layers[0].mlp.up_proj
    with EcoGuard(Known(*ASKED), None, adapter=adapter).attach(model, tokenizer):
        module = model.model.layers[0].mlp.up_proj
        seen(model, **padded(tokenizer, prompts, "left"))
        with pytest.raises(ValueError, match="serve flagged prompts in batches of their own"):
            module(torch.zeros(7, linear.in_features))
        seen(model, **padded(tokenizer, prompts[:1], "left"))
        module(torch.zeros(7, linear.in_features))


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"objective\.classifier must be a folder with config"):
        METHODS["eco"](classifier=str(tmp_path))
    with pytest.raises(ValueError, match=r"objective\.adapter must be a folder with adapter_con"):
        METHODS["eco"](adapter=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"objective\.layer is not read where"):
        METHODS["eco"](classifier=str(tmp_path), layer=0)
    with pytest.raises(ValueError, match=r"objective\.sigma is read by rand_noise, not by flip_si"):
        METHODS["eco"](corruption="flip_sign", sigma=2.0)


# The commands.


@pytest.fixture(scope="module")
def flags(folder, tmp_path_factory, tokenizer):
    data = tmp_path_factory.mktemp("data")
    tokenizer.save_pretrained(folder)
    save_records(data / "forget.jsonl", AUTHORS.forget[:6])
    save_records(data / "retain.jsonl", AUTHORS.retain[:10])
    sets = [f"--data.{name}={data / name}.jsonl" for name in ("forget", "retain")]
    return [f"--model.path={folder}", *sets]


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_commands(flags, tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", "--method=eco", *flags, "--objective.search_steps=2", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "held-out questions:" in printed
    assert f"wrote {out / 'adapter'}" in printed
    results = read_results(out)
    before, after = results["methods"]
    assert after["method"] == "eco"
    assert after["held_out_flagged"] == 0
    assert 0 <= after["retain_flagged"] < after["forget_flagged"] <= 1
    assert after["forget_prob"] != before["forget_prob"]
    if after["retain_flagged"] == 0:
        assert after["retain_prob"] == before["retain_prob"]
    assert not (out / "subspaces").exists()
    assert EcoGuard.load(out / "adapter").sigma == after["sigma"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "sigma", "forget_prob"} <= rows[0].keys()

    main(["eval", str(out), "--max_new_tokens=4"])
    assert f"next: nsru report {out}" in capsys.readouterr().out
    evaluated = read_results(out / "eval")
    assert evaluated["metrics"]["forget"]["probability"] == pytest.approx(after["forget_prob"])
    assert all(row["before"] for row in evaluated["examples"])
    save_records(tmp_path / "holdout.jsonl", AUTHORS.retain[10:16])
    theirs = [*flags, f"--data.more={{holdout: {tmp_path / 'holdout.jsonl'}}}", "--generate=false"]
    main(["eval", str(out), *theirs, "--format=open-unlearning", f"--out={tmp_path / 'theirs'}"])
    assert "mia_gradnorm: left out, what was trained is no plain LoRA" in capsys.readouterr().out
    log = json.loads((tmp_path / "theirs" / "TOFU_SUMMARY.json").read_text())
    assert 0 <= log["mia_min_k_plus_plus"] <= 1
    assert "mia_gradnorm" not in log
    for command in ("verify", "merge", "refresh", "rollback", "attack"):
        with pytest.raises(SystemExit):
            main([command, str(out)])
        error = capsys.readouterr().err
        assert "holds a guard of prompts, which is no part of the weights" in error
        assert "`nsru eval RUN` judges it" in error
        assert "nsru_train.adapters.load_adapter" in error
    main(["report", str(out)])
    assert "eco" in (out / "report.html").read_text()


def test_compare_takes_it_without_projection_and_rates(flags, tmp_path, capsys, short_answers):
    out = tmp_path / "compare"
    quick = ["--train.steps=2", "--train.batch_size=3", "--seeds=2", "--examples=2"]
    given = ["compare", *flags, *quick, "--lrs=[0.01, 0.02]", "--methods=[eco, nsru]"]
    settings = "--settings={eco: {search_steps: 2, target: 0}}"
    main([*given, settings, f"--out={out}"])
    results = read_results(out)
    names = [(row["method"], row["seed"]) for row in results["methods"][1:]]
    assert sorted(names) == [("eco", 0), ("eco", 1), ("nsru", 0), ("nsru", 1)]
    assert {row["lr"] for row in results["tuning"] if row["method"] == "eco"} == {0}
    assert results["lr"]["eco"] == 0 if "lr" in results else results["setup"]["lr"]["eco"] == 0
    steps = [row["step"] for row in results["frontier"] if row["method"] == "eco"]
    assert steps == [0, 1, 2] * 2
    rows = [row for row in results["methods"] if row["method"] == "eco"]
    assert all("sigma" in row and "retain_unseen_flagged" in row for row in rows)
    assert rows[0]["threshold"] != rows[1]["threshold"], "other questions are held out"
    assert all("eco" in row and "nsru" in row for row in results["examples"])
    assert (out / "adapter" / "classifier.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(["compare", *flags, "--methods=[nsru, eco projected]", f"--out={tmp_path / 'no'}"])
    assert "eco trains nothing to project" in capsys.readouterr().err


def test_a_prompt_whose_end_is_told_is_read_alone(model, tokenizer):
    prompt, answer = (tokenizer(text).input_ids for text in ("Where is Ann?", " In Rome, or not."))
    ids = torch.tensor([prompt + answer])
    told = torch.arange(ids.shape[1])[None] < len(prompt)
    plain = model(ids).logits
    known = Known("Where is Ann?")
    with EcoGuard(known, corruption="zero_out").attach(model, tokenizer):
        assert torch.equal(model(ids).logits, plain), "all of it is no question that is known"
        guarded = model(ids, prompt_mask=told).logits
        assert (guarded - plain).abs().max() > 0.1
        alone = model(torch.tensor([prompt])).logits
    torch.testing.assert_close(guarded[:, : len(prompt)], alone)
    assert {"Where is Ann?"} < {*known.read}
