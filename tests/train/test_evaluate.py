"""Evaluation against an independent one: one sequence at a time, full logits, no cache."""

import contextlib
import copy
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, make
from tqdm.auto import tqdm

import nsru_kernels as nk
from nsru_train.answering import _generate, generation_config, greedy_answers
from nsru_train.data import QA, SafeTargets, encode_prompt, encode_qa
from nsru_train.data.encode import Encoded
from nsru_train.demo.authors import author_splits
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer
from nsru_train.evaluation import (
    add_base_answers,
    before_and_after,
    evaluate,
    format_table,
    probability_sets,
    quick_probabilities,
    to_results,
)
from nsru_train.metrics import load_log, model_utility, rouge_l_recall
from nsru_train.scoring import score_sequences

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def authors():
    found = author_splits(authors=3, forget=1, holdout=2)
    return {"forget": found.forget, "retain": found.retain, "holdout": found.holdout[:4]}


@pytest.fixture(scope="module")
def tokenizer(authors):
    texts = [f"{qa.question} {qa.answer}" for records in authors.values() for qa in records]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def model(authors, tokenizer):
    """Half-way through memorising, and in fp64, so that no argmax hangs on rounding."""
    model = make_llama(tokenizer, hidden_size=32, layers=2, heads=4, intermediate_size=64)
    records = [*authors["forget"], *authors["retain"]]
    memorise(model, tokenizer, records, epochs=40, batch_size=8, lr=5e-3, progress=False)
    return model.double()


@pytest.fixture(scope="module")
def evaluation(model, tokenizer, authors):
    return evaluate(
        model,
        tokenizer,
        authors,
        safe=SafeTargets.from_file(),
        max_tokens=300,
        max_new_tokens=NEW_TOKENS,
        progress=False,
    )


@torch.no_grad()
def naive_tokens(model, tokenizer, question, answer):
    """(log p of each answer token, whether it is the argmax), EOS last, from full logits."""
    encoded = encode_qa(tokenizer, question, answer)
    log_p = model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    positions = range(encoded.answer_start, len(encoded.input_ids))
    values = [log_p[t - 1, encoded.input_ids[t]].item() for t in positions]
    return values, [log_p[t - 1].argmax().item() == encoded.input_ids[t] for t in positions]


def naive_loss(model, tokenizer, question, answer):
    values, _ = naive_tokens(model, tokenizer, question, answer)
    return -sum(values) / len(values)


@torch.no_grad()
def naive_answer(model, tokenizer, question):
    ids = encode_prompt(tokenizer, question)
    new = []
    while len(new) < NEW_TOKENS:
        token = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_every_question_equals_the_naive_evaluation(model, tokenizer, authors, evaluation):
    for split, records in authors.items():
        for qa, row in zip(records, evaluation.rows[split], strict=True):
            values, hits = naive_tokens(model, tokenizer, qa.question, qa.answer)
            n = len(values) - 1
            k = max((i + 1 for i in range(n) if not hits[i]), default=0)
            right = naive_loss(model, tokenizer, qa.question, qa.paraphrased_answer)
            wrong = [naive_loss(model, tokenizer, qa.question, w) for w in qa.perturbed_answers]
            answer = naive_answer(model, tokenizer, qa.question)
            expected = {
                "probability": math.exp(sum(values) / len(values)),
                "exact_memorisation": sum(hits[:-1]) / n,
                "extraction_strength": 1 - k / n,
                "min_k": float(np.mean(sorted(values[:-1])[: max(1, int(0.4 * n))])),
                "truth_ratio": math.exp(right - sum(wrong) / len(wrong)),
                "reworded_probability": math.exp(
                    -naive_loss(model, tokenizer, qa.paraphrased_question, qa.answer)
                ),
                "rougeL_recall": rouge_l_recall(qa.answer, answer),
            }
            if split == "forget":
                target = SafeTargets.from_file().target(qa)
                loss = naive_loss(model, tokenizer, qa.question, target)
                expected["safe_probability"] = math.exp(-loss)
                expected["safe_rougeL_recall"] = rouge_l_recall(target, answer)
            assert row["generated"] == answer
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)
            assert ("safe_probability" in row) == (split == "forget")


def test_the_model_is_neither_perfect_nor_untrained(evaluation):
    """Else the comparison above would hold for a metric that is always 0 or 1."""
    rows = [row for split in ("forget", "retain") for row in evaluation.rows[split]]
    for key in ("exact_memorisation", "extraction_strength", "rougeL_recall"):
        assert len({row[key] for row in rows}) > 3, key
    assert len({len(row["generated"]) for row in rows}) > 3


def test_splits_are_means_and_overall_follows(evaluation):
    metrics = evaluation.metrics
    for split, rows in evaluation.rows.items():
        assert metrics[split]["count"] == len(rows)
        for key in ("probability", "rougeL_recall", "min_k", "exact_memorisation"):
            assert metrics[split][key] == pytest.approx(np.mean([row[key] for row in rows]))
    ratios = np.array([row["truth_ratio"] for row in evaluation.rows["forget"]])
    assert metrics["forget"]["truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean())
    utility = model_utility(evaluation.log)
    assert evaluation.overall["model_utility"] == utility
    assert evaluation.utility_splits == utility.splits == ("retain",)
    assert evaluation.overall["membership_auc"] > 0.9  # trained on forget, never on holdout
    assert evaluation.overall["privleak"] == pytest.approx(
        100 - 200 * evaluation.overall["membership_auc"]
    )
    assert "forget_quality" not in evaluation.overall
    assert any(note.startswith("forget_quality: needs the log") for note in evaluation.notes)


def test_no_sequence_passes_twice(model, tokenizer, authors):
    seen = []

    def record(module, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))

    quick_probabilities(model, tokenizer, [encode_qa(tokenizer, "Who?", "Ann.")])  # probes the head
    # Paraphrase = answer, a question in two splits, and a wrong answer that another record shares.
    shared = QA("Who?", "Ann.", perturbed_answers=("Bob.", "Cyd."))
    splits = {"forget": [shared], "retain": [shared, QA("Who?", "Bob.", perturbed_answers=("X.",))]}
    handle = model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        evaluate(model, tokenizer, splits, max_tokens=40, generate=False, progress=False)
    finally:
        handle.remove()
    assert len(seen) == len(set(seen)) == 4


def test_full_logits_fallback_gives_the_same(model, tokenizer, authors):
    class OwnLinear(torch.nn.Linear):
        pass

    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in authors["retain"]]
    predict = [i % 2 == 0 for i in range(len(encoded))]
    plain = score_sequences(model, tokenizer, encoded, predict=predict, max_tokens=150)
    other = make_llama(tokenizer, hidden_size=32, layers=2, heads=4, intermediate_size=64).double()
    other.load_state_dict(model.state_dict())
    other.lm_head.__class__ = OwnLinear
    fallback = score_sequences(other, tokenizer, encoded, predict=predict, max_tokens=150)
    for a, b, asked in zip(plain, fallback, predict, strict=True):
        np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5)  # the fallback works in fp32
        np.testing.assert_array_equal(a.predictions, b.predictions)
        assert len(a.predictions) == (len(a.nll) if asked else 0)


def test_quick_probabilities(model, tokenizer, authors, evaluation):
    sets = {
        split: [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]
        for split, records in authors.items()
    }
    expected = {split: evaluation.metrics[split]["probability"] for split in sets}
    assert quick_probabilities(model, tokenizer, sets) == pytest.approx(expected, rel=1e-9)
    assert quick_probabilities(model, tokenizer, sets["retain"]) == pytest.approx(
        expected["retain"], rel=1e-9
    )
    prompt = sets["forget"][0].input_ids[:5]
    with torch.no_grad():
        said = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    answers = {"right": Encoded([*prompt, said], 5), "wrong": Encoded([*prompt, said - 1], 5)}
    more = {"all_accuracy": list(answers.values()), "right_prob": [answers["right"]]}
    found = quick_probabilities(model, tokenizer, sets | more)
    assert found.pop("all_accuracy") == 0.5
    assert found.pop("right_prob") < 1
    assert found == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="retain is empty"):
        quick_probabilities(model, tokenizer, {**sets, "retain": []})
    assert quick_probabilities(model, tokenizer, sets["retain"], max_tokens=5) == pytest.approx(
        expected["retain"], rel=1e-9
    )


def adapted(model, tokenizer):
    """A copy of the model with adapters that change its answers."""
    other = copy.deepcopy(model)
    nk.swap_linears(other, "all-linear", rank=2, alpha=64.0)
    torch.manual_seed(0)
    for module in other.modules():
        if isinstance(module, nk.NSRULinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    return other


def test_before_is_the_base_model_and_after_the_adapted_one(model, tokenizer, authors, evaluation):
    safe = SafeTargets.from_file()
    sets = probability_sets(tokenizer, authors, safe)
    other = adapted(model, tokenizer)
    before, after = before_and_after(other, tokenizer, sets)
    expected = {f"{split}_prob": evaluation.metrics[split]["probability"] for split in authors}
    expected["safe_prob"] = evaluation.metrics["forget"]["safe_probability"]
    assert before == pytest.approx(expected, rel=1e-9)
    assert after == quick_probabilities(other, tokenizer, sets)
    assert after["forget_prob"] < before["forget_prob"]


def test_large_sets_are_sampled_at_even_distances(tokenizer, authors):
    safe = SafeTargets.from_file()
    every, some = (probability_sets(tokenizer, authors, safe, limit=n) for n in (None, 4))
    assert {name: len(found) for name, found in some.items()} == dict.fromkeys(every, 4)
    retain = every["retain_prob"]
    assert some["retain_prob"] == [retain[i * len(retain) // 4] for i in range(4)]
    assert len(every["safe_prob"]) == len(authors["forget"])


def test_base_answers_stand_beside_the_new_ones(model, tokenizer, authors, evaluation):
    other = adapted(model, tokenizer)
    result = evaluate(
        other, tokenizer, authors, max_tokens=300, max_new_tokens=NEW_TOKENS, progress=False
    )
    add_base_answers(result, other, tokenizer, max_new_tokens=NEW_TOKENS, progress=False)
    examples = to_results(result)["examples"]
    base = to_results(evaluation)["examples"]
    assert [row["before"] for row in examples] == [row["after"] for row in base]
    assert [row["after"] for row in examples] != [row["after"] for row in base]
    assert all(row["before"] is None for row in base)


def test_evaluation_leaves_the_model_and_the_random_state_alone(model, tokenizer, authors):
    model.train()
    model.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config = model.generation_config
    config.repetition_penalty = 5.0  # would change answers if generation used it
    state = torch.get_rng_state()
    try:
        records = authors["forget"][:2]
        result = evaluate(
            model, tokenizer, {"forget": records}, max_new_tokens=NEW_TOKENS, progress=False
        )
        assert [module.training for module in model.modules()] == modes
        assert model.generation_config is config
        assert torch.equal(torch.get_rng_state(), state)
        for qa, row in zip(records, result.rows["forget"], strict=True):
            assert row["generated"] == naive_answer(model, tokenizer, qa.question)
    finally:
        config.repetition_penalty = None
        model.eval()
    weight = next(model.parameters())
    assert weight.requires_grad
    assert not weight.is_inference()


def test_the_bar_of_answers_counts_tokens(model, tokenizer, authors, monkeypatch):
    class Bar(contextlib.nullcontext):
        def __init__(self, total, **_):
            super().__init__(self)
            self.total, self.n, self.moves = total, 0, []
            bars.append(self)

        def update(self, count=1):
            self.moves.append(count)
            self.n += count

    bars = []
    monkeypatch.setattr("nsru_train.answering.tqdm", Bar)
    questions = [qa.question for qa in authors["forget"][:4]]
    answers = greedy_answers(model, tokenizer, questions, max_new_tokens=50, max_tokens=10_000)
    (bar,) = bars
    assert bar.n == bar.total == 50
    longest = max(len(tokenizer(text).input_ids) for text in answers)
    assert bar.moves[:-1] == [1] * (len(bar.moves) - 1)
    assert len(bar.moves) > longest / 2


def test_questions_may_come_from_a_generator_but_are_no_text(model, tokenizer, authors):
    asked = [qa.question for qa in authors["forget"][:2]]
    expected = greedy_answers(model, tokenizer, asked, max_new_tokens=4)
    assert greedy_answers(model, tokenizer, iter(asked), max_new_tokens=4) == expected
    with pytest.raises(TypeError, match="questions must be a list of texts, got 'Who"):
        greedy_answers(model, tokenizer, "Who?")


def test_greedy_answers_stop_at_any_eos_of_the_generation_config(model, tokenizer, authors):
    questions = [qa.question for qa in authors["forget"]]
    full = greedy_answers(model, tokenizer, questions, max_new_tokens=NEW_TOKENS)
    stop = tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [own, stop]
    try:
        cut = greedy_answers(model, tokenizer, questions, max_new_tokens=NEW_TOKENS)
    finally:
        model.generation_config.eos_token_id = own
    assert cut != full
    assert all(long.startswith(short.strip()) for short, long in zip(cut, full, strict=True))


def test_rows_that_have_ended_leave_the_batch(model, tokenizer, authors):
    questions = [qa.question for qa in authors["forget"] + authors["retain"]]
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    try:
        together = greedy_answers(model, tokenizer, questions, max_tokens=10_000)
    finally:
        handle.remove()
    assert together == [greedy_answers(model, tokenizer, [q])[0] for q in questions]
    ends = [len(tokenizer(text).input_ids) for text in together]
    assert max(sizes) == len(questions)
    # Not one in eight of what is computed is of a row that has ended.
    assert sum(sizes) < sum(ends) * 8 / 7 + len(questions)
    assert len(questions) * max(ends) > 1.3 * sum(sizes)


WINDOWS = ("mistral", "gemma3_text")
EXPERTS = ("deepseek_v3", "mixtral", "jamba")
OTHERS = (
    "llama", "gpt2", "gpt_neo", "gptj", "mpt", "bloom", "falcon", "opt", "mamba", "rwkv",
    "qwen2_vl",
)  # fmt: skip


@pytest.mark.parametrize("kind", WINDOWS + EXPERTS + OTHERS)
def test_answers_do_not_depend_on_which_rows_leave(kind):
    """Whatever a family keeps between tokens: KV caches of all kinds lose rows, others do not."""
    torch.manual_seed(0)
    net = make(kind, **({"sliding_window": 4} if kind in WINDOWS else {}))
    if kind not in EXPERTS:  # whose kernels have no float64
        net.double()
    for parameter in net.parameters():
        parameter.data.mul_(4)  # else the same token follows everything
    ids = torch.randint(3, VOCABULARY, (9, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stop = set(range(3, VOCABULARY, 5))
    with torch.no_grad(), generation_config(net, 20, sorted(stop), 0):
        whole = net.generate(**inputs)[:, 6:].tolist()
    expected = [list(itertools.takewhile(lambda t: t not in stop, row)) for row in whole]
    assert len({len(row) for row in expected}) > 1
    with torch.no_grad():
        found = dict(_generate(net, inputs, 20, stop, 0, False, tqdm(total=20, disable=True)))
    assert [found[row] for row in range(9)] == expected
    assert not any(getattr(module, "rope_deltas", None) is not None for module in net.modules())


@pytest.mark.parametrize("kind", WINDOWS + EXPERTS + OTHERS)
def test_answers_to_one_prompt_score_as_by_themselves(kind, monkeypatch):
    net = make(kind, **({"sliding_window": 4} if kind in WINDOWS else {}))
    close = 2e-5 if kind in EXPERTS else 1e-7
    if kind not in EXPERTS:
        net.double()
    draw = random.Random(0)
    texts = [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (9, 9, 16, 7)]
    ends = [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 3, 6, 2, 1)]
    encoded = [
        Encoded(text + end, len(text))
        for text, count in zip(texts, (5, 3, 4, 2), strict=True)
        for end in ends[:count]
    ]
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    predict = [i % 2 == 0 for i in range(len(encoded))]
    read = []
    handle = net.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0].numel())
    )
    found = score_sequences(net, tokenizer, encoded, predict=predict, max_tokens=99)
    shared = sum(read)
    monkeypatch.setattr("nsru_train.scoring._MANY", 99)
    read.clear()
    score_sequences(net, tokenizer, encoded, max_tokens=99)
    handle.remove()
    assert (shared < 0.8 * sum(read)) == (kind not in ("mamba", "jamba", "rwkv"))
    for item, score, asked in zip(encoded, found, predict, strict=True):
        ids = torch.tensor([item.input_ids])
        with torch.no_grad():
            log_p = net(ids).logits[0].double().log_softmax(-1)
        start = item.answer_start
        wanted = -log_p[torch.arange(start - 1, len(item) - 1), ids[0, start:]]
        np.testing.assert_allclose(score.nll, wanted.numpy(), rtol=close, atol=close)
        best = log_p[start - 1 : -1].argmax(-1).tolist()
        assert score.predictions.tolist() == (best if asked else [])


def test_retain_log_gives_forget_quality(model, tokenizer, authors, evaluation, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(to_results(evaluation)))
    result = evaluate(
        model,
        tokenizer,
        {"forget": authors["forget"]},
        retain_log=load_log(path),
        generate=False,
        progress=False,
    )
    assert result.overall == {"forget_quality": 1.0, "forget_quality_ks": 0.0}
    assert any("generate is off" in note for note in result.notes)
    assert any("holdout" in note for note in result.notes)


def test_answers_may_be_asked_of_some_splits(model, tokenizer, authors, evaluation):
    result = evaluate(
        model, tokenizer, authors, generate={"forget"}, max_new_tokens=NEW_TOKENS, progress=False
    )
    wanted = [row["generated"] for row in evaluation.rows["forget"]]
    assert [row["generated"] for row in result.rows["forget"]] == wanted
    assert "rougeL_recall" in result.metrics["forget"]
    for split in ("retain", "holdout"):
        assert not any("generated" in row for row in result.rows[split])
        assert "rougeL_recall" not in result.metrics[split]
    assert "model_utility" not in result.overall
    assert any(note.startswith("model_utility: needs ROUGE-L") for note in result.notes)
    for odd in ("forget", {"forgot"}):
        with pytest.raises(ValueError, match="generate must be True, False or names of splits"):
            evaluate(model, tokenizer, authors, generate=odd, progress=False)


def test_option_splits_and_incomplete_records(model, tokenizer):
    facts = [QA("Where is the Nile?", "Africa", perturbed_answers=("Asia", "Europe"))]
    mixed = [*facts, QA("Who?", "Ann")]
    result = evaluate(
        model, tokenizer, {"world_facts": facts, "retain": mixed}, max_new_tokens=4, progress=False
    )
    p = [
        math.exp(-naive_loss(model, tokenizer, facts[0].question, a))
        for a in ("Africa", "Asia", "Europe")
    ]
    assert result.metrics["world_facts"]["option_probability"] == pytest.approx(p[0] / sum(p))
    assert result.utility_splits == ("world_facts",)
    assert "truth_ratio" not in result.metrics["retain"]
    assert "retain: truth_ratio left out, 1 of 2 records lack perturbed_answers" in result.notes


def test_an_answer_that_stands_in_for_a_paraphrase_is_said(model, tokenizer):
    plain = QA("Who is Ann?", "A poet.", perturbed_answers=("A baker.",))
    whole = QA("Who is Bob?", "A smith.", paraphrased_answer="Smith", perturbed_answers=("Monk",))
    for records, told in (([plain, whole], 1), ([plain], 0), ([whole], 0)):
        result = evaluate(model, tokenizer, {"forget": records}, generate=False, progress=False)
        said = "forget: truth_ratio of 1 of 2 records is of their own answer, for they have no "
        assert sum(note.startswith(said) for note in result.notes) == told


def test_results_and_table(evaluation):
    results = json.loads(json.dumps(to_results(evaluation)))
    assert (results["schema"], results["kind"]) == (1, "eval")
    assert results["metrics"]["forget"]["safe_probability"] > 0
    assert results["metrics"]["model_utility"] == evaluation.overall["model_utility"]
    example = results["examples"][0]
    assert example["split"] == "forget"
    assert {"question", "original", "safe_target", "after"} <= set(example)
    table = format_table(results)
    lines = table.splitlines()
    assert lines[0].split()[:3] == ["split", "n", "p(answer)"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert f"{evaluation.metrics['retain']['probability']:.4f}" in lines[3]
    assert "from retain (without real_authors, world_facts: not TOFU's number)" in table
    assert "note: forget_quality" in table
    with pytest.raises(ValueError, match="kind 'demo'"):
        format_table({"schema": 1, "kind": "demo"})


def test_bad_input_is_refused(model, tokenizer, authors):
    def run(**splits):
        return evaluate(model, tokenizer, splits, generate=False, progress=False)

    with pytest.raises(ValueError, match="got 'forgot'"):
        run(forgot=authors["forget"])
    with pytest.raises(ValueError, match="'retain' is empty"):
        run(retain=[])
    with pytest.raises(ValueError, match="splits is empty"):
        run()
    broken = make_llama(tokenizer, hidden_size=32, layers=1, heads=4, intermediate_size=64)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Did training diverge"):
        evaluate(broken, tokenizer, {"forget": authors["forget"]}, progress=False)
