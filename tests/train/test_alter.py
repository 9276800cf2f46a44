"""ALTER: entropy, phases, isolation, routing, its folder, and the way from files to a report."""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import samples
import torch
import transformers
from torch.func import functional_call

import nsru_kernels as nk
from nsru_train.adapters import load_adapter
from nsru_train.answering import greedy_answers
from nsru_train.cli import main
from nsru_train.data.encode import collate, encode_prompt, encode_qa
from nsru_train.demo.tiny_model import make_llama
from nsru_train.losses import FORGET, RETAIN, ScoredBatch
from nsru_train.losses.nll import answer_states
from nsru_train.methods import METHODS
from nsru_train.methods.alter import name_domains, tsallis
from nsru_train.routed import CONFIG, WEIGHTS, RoutedLinear, save_routed
from nsru_train.sources import save_records

ALTER = METHODS["alter"]
DOMAINS = [0, 1, 0, 1, 1]  # of samples.FORGET
FORGOTTEN = [
    replace(qa, domain=("Towns", "hamlets")[number])
    for qa, number in zip(samples.FORGET, DOMAINS, strict=True)
]


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer()


def adapt(model, tokenizer, **settings):
    report = ALTER(**settings).adapt(model, nk.SwapReport(), tokenizer, FORGOTTEN, samples.RETAIN)
    return model, report


@pytest.fixture
def model(tokenizer):
    """Float64 for hand computations, with B that matter."""
    return adapt(samples.make_model(tokenizer), tokenizer, noise=0.3)[0].double().eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two answers of the first domain, one of the second, two to keep."""
    records = [samples.FORGET[i] for i in (0, 2, 1)] + samples.RETAIN[:2]
    rows = collate([encode_qa(tokenizer, qa.question, qa.answer) for qa in records], 0)
    return rows | {
        "kind": torch.tensor([FORGET] * 3 + [RETAIN] * 2),
        "domain": torch.tensor([0, 0, 1, -1, -1]),
        "ref_nll": torch.zeros(5),
    }


def rows_of(batch, *rows):
    return {name: value[list(rows)] for name, value in batch.items()}


def routed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}


def gradients(model, loss):
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    made = torch.autograd.grad(loss, found.values(), allow_unused=True)
    return dict(zip(found, made, strict=True))


@pytest.mark.parametrize("q", [0.5, 1, 1.5, 2.0])
def test_entropy_is_the_formula(q):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 11, dtype=torch.float64)
    logits[0], logits[1, 3], logits[2, 5] = 0.0, 80.0, -torch.inf
    p = logits.softmax(1)
    if q == 1:
        expected = [-sum(x * x.log() for x in row if x > 0) for row in p]
    else:
        expected = [(1 - sum(x**q for x in row)) / (q - 1) for row in p]
    torch.testing.assert_close(tsallis(logits, q), torch.stack(expected))
    assert tsallis(logits, q)[1] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(tsallis(logits, q + 1e-7), tsallis(logits, q), rtol=0, atol=1e-5)


def by_hand(model, batch, method, phase):
    """Loss and gradients of A and B by a model for each row, with W + s (B_r + B_d) A written out.

    Returns (total, gradient of every adapter parameter); which rows reach which B is given by the
    rows that are differentiated.
    """
    plain = make_llama(samples.make_tokenizer(), **SIZES).double()
    plain.get_output_embeddings().weight.data.mul_(20)
    loaded = plain.load_state_dict(
        {n: p for n, p in model.state_dict().items() if "lora_" not in n}, strict=True
    )
    assert not loaded.missing_keys
    leaves = {
        n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if "lora" in n
    }
    terms = {FORGET: [], RETAIN: []}
    base = answer_logits(plain, {}, batch)
    for row, kind in enumerate(batch["kind"].tolist()):
        weights = {}
        for name, module in routed(model).items():
            a, b = leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"]
            rank, domain = module.rank, batch["domain"][row].item()
            update = b[:, :rank] if domain < 0 else b[:, :rank].detach()
            if domain >= 0:
                update = update + b[:, (1 + domain) * rank : (2 + domain) * rank]
            weights[f"{name}.weight"] = module.weight + module.alpha / rank * update @ a
        logits, targets = answer_logits(plain, weights, rows_of(batch, row))[0]
        p = logits.softmax(1)
        right = p.gather(1, targets[:, None])[:, 0]
        others = p.scatter(1, targets[:, None], 0).amax(1)
        values = 1 + right - others if kind == FORGET else -right.log()
        q = base[row][0].softmax(1)
        entropy = (1 - (q**method.q).sum(1)) / (method.q - 1)
        terms[kind] += zip(values, entropy, strict=True)
    total = 0
    for kind, pairs in terms.items():
        if phase == 1 and method.threshold is not None:
            pairs = [pair for pair in pairs if pair[1] > method.threshold]
        elif phase == 1:
            count = -int(-method.share * len(pairs) // 1)
            pairs = sorted(pairs, key=lambda pair: -pair[1].item())[:count]
        assert pairs
        weight = method.w_forget if kind == FORGET else method.w_retain
        total = total + weight * torch.stack([value for value, _ in pairs]).mean()
    return total, dict(zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True))


SIZES = samples.SIZES | {"hidden_size": 16, "intermediate_size": 24, "max_length": 64}


def answer_logits(plain, weights, batch):
    """(logits, targets) of each row's answer."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = functional_call(plain, weights, kwargs=inputs).logits
    seen = batch["labels"][:, 1:] != -100
    return [
        (z[:-1][keep], y[1:][keep])
        for z, keep, y in zip(logits, seen, batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    "settings", [{"share": 0.3}, {"threshold": 1.1, "q": 1.7, "w_forget": 0.5}]
)
def test_both_phases_are_those_of_a_hand_computation(model, batch, phase, settings):
    method = ALTER(**settings)
    now = method.at(0.2 if phase == 1 else 0.25)
    loss = now.loss(ScoredBatch(model, batch, now.by_logits))["total"]
    wanted, wanted_gradients = by_hand(model, batch, method, phase)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-7, atol=1e-12)


def test_every_b_learns_from_its_own_rows_only(model, batch):
    method = ALTER().at(0.9)
    ranks = {name: module.rank for name, module in routed(model).items()}
    whole = gradients(model, method.loss(ScoredBatch(model, batch, (FORGET,)))["total"])
    for expert, own in enumerate(([3, 4], [0, 1], [2])):
        others = [row for row in range(5) if row not in own]
        parts = [
            gradients(
                model, method.loss(ScoredBatch(model, rows_of(batch, *rows), (FORGET,)))["total"]
            )
            for rows in (own, others)
        ]
        for name, rank in ranks.items():
            columns = slice(expert * rank, (expert + 1) * rank)
            mine, foreign, both = (found[f"{name}.lora_B"][:, columns] for found in (*parts, whole))
            assert mine.any()
            assert both.any()
            assert not foreign.any()


def trainer(folder, tokenizer, **arguments):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    made = samples.make_trainer(
        folder, objective=ALTER(structure=0.5, a_rate=0.5), model=model, **arguments
    )
    made.train_dataset.domains = DOMAINS
    return made


def test_phase_one_trains_a_and_phase_two_the_b(tmp_path, tokenizer):
    seen = {}

    def look(step, model):
        seen[step] = samples.adapters(model)
        return {"forget_prob": 0.0}

    made = trainer(tmp_path, tokenizer, trainer={"on_eval": look, "eval_steps": 4})
    made.train()
    for name in seen[0]:
        first, second = (not torch.equal(seen[i][name], seen[i + 4][name]) for i in (0, 4))
        assert (first, second) == (("lora_A" in name), ("lora_B" in name)), name
    rates = {g["initial_lr"]: len(g["params"]) for g in made.optimizer.param_groups if g["params"]}
    assert rates == {1e-2: len(seen[0]) / 2, 0.5e-2: len(seen[0]) / 2}


@pytest.mark.parametrize("step", [2, 6], ids=["in phase I", "in phase II"])
def test_a_resumed_run_goes_on_in_its_phase(tmp_path, tokenizer, step):
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", tokenizer, **saves)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"half/checkpoint-{step}")
    half = trainer(tmp_path / "half", tokenizer, **saves)
    half.train(resume_from_checkpoint=True)
    assert half.state.global_step == 8
    wanted = samples.adapters(whole.model)
    for name, tensor in samples.adapters(half.model).items():
        assert torch.equal(tensor, wanted[name]), name
    other = trainer(tmp_path / "half", tokenizer, **saves)
    other.train_dataset.domains = [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="another run: the domains changed"):
        other.train(resume_from_checkpoint=True)


def chosen(model):
    weights = model.prompt_router.chosen_BD
    return torch.where(weights.any(1), weights.argmax(1) + 1, 0).tolist()


def test_prompts_choose_and_answers_do_not(tokenizer):
    model, report = adapt(samples.make_model(tokenizer), tokenizer)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    records = [*samples.FORGET, *samples.RETAIN]
    wanted = [1 + number for number in DOMAINS] + [0] * len(samples.RETAIN)
    for answers in ([qa.answer for qa in records], [qa.answer for qa in reversed(records)]):
        rows = [
            encode_qa(tokenizer, qa.question, text)
            for qa, text in zip(records, answers, strict=True)
        ]
        answer_states(model, collate(rows, 0))
        assert chosen(model) == wanted
    calls = []
    model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(chosen(model)))
    greedy_answers(model, tokenizer, [qa.question for qa in records], max_new_tokens=3)
    assert sorted(calls[-1]) == sorted(wanted)
    longest = sorted(records, key=lambda qa: -len(encode_prompt(tokenizer, qa.question)))
    assert calls[-1] == [wanted[records.index(qa)] for qa in longest]
    with nk.adapters_disabled(model), torch.no_grad():
        model(torch.tensor([encode_prompt(tokenizer, "Who is it?")]))
    assert chosen(model) == calls[-1]


def test_a_prompt_in_pieces_is_refused(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    ids = torch.tensor([encode_prompt(tokenizer, samples.FORGET[0].question)])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        begun = model(ids[:, :3], use_cache=True).past_key_values
        with nk.adapters_disabled(model):
            plain = model(ids, use_cache=True).past_key_values
    for pieces in ({"prefill_chunk_size": 4}, {"past_key_values": begun}):
        with pytest.raises(ValueError, match=r"on top of a KV cache\. This model decides by"):
            model.generate(ids, **options, **pieces)
    with pytest.raises(ValueError, match="1 rows go on after unknown prompts"):
        model(ids[:, :1], past_key_values=plain)


def test_each_answer_goes_on_with_the_choice_of_its_own_prompt(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    records = [samples.FORGET[0], samples.RETAIN[0]]
    prompts = [torch.tensor([encode_prompt(tokenizer, qa.question)]) for qa in records]
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for ids in prompts]
        choices = []
        for cache in (*caches, copy.deepcopy(caches[0])):
            model(torch.tensor([[5]]), past_key_values=cache)
            choices += chosen(model)
    assert choices == [1 + DOMAINS[0], 0, 1 + DOMAINS[0]]


def test_rows_of_a_cache_take_their_choice_along(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    prompts = [encode_prompt(tokenizer, qa.question) for qa in (*samples.FORGET, *samples.RETAIN)]
    ids = torch.tensor([prompt[:4] for prompt in prompts])
    token = torch.full((len(ids), 1), 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model.prompt_router.chosen_BD = None
        begun = [[int(i % 2 == 0), int(i % 3 == 1)] for i in range(len(ids))]
        cache._nsru_decision = torch.tensor(begun).float()
        for rows in (torch.arange(len(ids)).flip(0), torch.arange(len(ids)).roll(1)):
            cache.reorder_cache(rows)
            begun = [begun[row] for row in rows]
        model(token, past_key_values=cache)
        assert model.prompt_router.chosen_BD.tolist() == begun
        cache.batch_select_indices(torch.tensor([0, 2]))
        model(token[:2], past_key_values=cache)
        assert model.prompt_router.chosen_BD.tolist() == [begun[0], begun[2]]
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="3 rows go on after 4 prompts"):
            model(token[:3], past_key_values=cache)


def test_threads_answer_as_one_after_the_other(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    for module in routed(model).values():
        torch.nn.init.normal_(module.lora_B)
    questions = [qa.question for qa in (*samples.FORGET, *samples.RETAIN)]

    def say(question):
        return greedy_answers(model, tokenizer, [question], max_new_tokens=6)

    alone = [say(question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(say, questions * 3)] == alone * 3
    assert len({*map(str, alone)}) > 1
    pickle.loads(pickle.dumps(model.prompt_router))


def test_a_mask_that_shows_no_prompt_is_refused(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    prompts = {"input_ids": torch.tensor([[0, 5, 6], [5, 6, 7]]), "pad_token_id": 0}
    prompts["attention_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="generate without cache_implementation"):
        model.generate(**prompts, max_new_tokens=3, cache_implementation="static")
    for columns in (2, 4):
        mask = torch.ones(2, columns, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"must be \[B, S\] = \(2, 3\) where"):
            model(prompts["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Mamba"])
def test_other_families_keep_the_choice_of_their_prompt_too(tokenizer, kind):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "GPTNeoX":
        sizes |= {"intermediate_size": 24, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    model, _ = adapt(model, tokenizer)
    prompts = [encode_prompt(tokenizer, qa.question) for qa in samples.FORGET]
    choices = []
    model.base_model.register_forward_hook(lambda *_: choices.append(chosen(model)))
    model.generate(torch.tensor(prompts), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert choices == [[1 + number for number in DOMAINS]] * 3


def test_a_model_that_would_serve_without_a_choice_is_refused(tokenizer):
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=24, word_embed_proj_dim=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    with pytest.raises(ValueError, match="forward does not call their base_model, such as OPT"):
        adapt(model, tokenizer)


def test_an_expert_changes_answers_of_its_domain_alone(tokenizer):
    model, _ = adapt(samples.make_model(tokenizer), tokenizer)
    rows = [encode_qa(tokenizer, qa.question, qa.answer) for qa in samples.RECORDS]
    batch = collate(rows, 0)
    with torch.no_grad():
        before = answer_states(model, batch).hidden
        for module in routed(model).values():
            module.lora_B[:, 2 * module.rank :] = torch.randn(module.out_features, module.rank)
        states = answer_states(model, batch)
    changed = {int(row) for row in states.rows[(states.hidden != before).any(1)]}
    assert changed == {i for i, number in enumerate(DOMAINS) if number == 1}


def test_projected_experts_leave_the_retain_subspace_alone(tmp_path, tokenizer):
    model = make_llama(tokenizer, **SIZES)
    names = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
    bases = {n: torch.linalg.qr(torch.randn(m.in_features, 5)).Q for n, m in names.items()}
    nk.swap_linears(model, list(names), rank=3, alpha=6, subspaces=bases)
    model, _ = adapt(model, tokenizer, noise=0.3)
    made = samples.make_trainer(tmp_path, objective=ALTER(), model=model)
    made.train_dataset.domains = DOMAINS
    made.train()
    model.eval().prompt_router.chosen_BD = torch.eye(3)[:, 1:]
    for name, module in routed(model).items():
        assert module.leakage() < 1e-6
        inside = torch.randn(3, 4, 5) @ bases[name].T
        outside = torch.randn(3, 4, module.in_features)
        plain = torch.nn.functional.linear
        torch.testing.assert_close(
            module(inside), plain(inside, module.weight, module.bias), rtol=1e-4, atol=1e-4
        )
        assert (module(outside) - plain(outside, module.weight, module.bias)).abs().max() > 1e-2


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A base model, the same with experts, a batch, and the folder that holds the experts."""
    base = make_llama(tokenizer, **SIZES)
    model = copy.deepcopy(base)
    nk.swap_linears(model, "all-linear", rank=3, alpha=6, rank_pattern={"q_proj": 2})
    model, _ = adapt(model, tokenizer, noise=0.3)
    fingerprint = nk.subspaces.collection.fingerprint_weights(base)
    save_routed(model, tmp_path / "adapter", {"fingerprint": fingerprint})
    rows = [encode_qa(tokenizer, qa.question, qa.answer) for qa in samples.RECORDS]
    return base, model.eval(), collate(rows, 0), tmp_path / "adapter"


def test_what_is_saved_serves_as_what_was_trained(saved, tokenizer):
    base, model, batch, folder = saved
    load_adapter(base, folder)
    with torch.no_grad():
        ours, theirs = (answer_states(m, batch).hidden for m in (base, model))
        with nk.adapters_disabled(model):
            plain = answer_states(model, batch).hidden
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, plain, atol=1e-3)
    assert base.prompt_router.domains == ["Towns", "hamlets"]
    questions = [qa.question for qa in samples.RECORDS]
    ours, theirs = (
        greedy_answers(m, tokenizer, questions, max_new_tokens=4) for m in (base, model)
    )
    assert ours == theirs
    for refuse in (lambda: nk.merge_adapters(model), lambda: routed(model).popitem()[1].merge()):
        with pytest.raises(ValueError, match="chosen by each prompt, so there is no one weight"):
            refuse()
    with pytest.raises(ValueError, match="is no plain LoRA: lora_B has 6 columns"):
        nk.save_lora_adapter(model, folder.parent / "plain")
    with pytest.raises(ValueError, match="no plain linear"):
        load_adapter(base, folder)


def edit(**changes):
    def damage(folder):
        path = folder / CONFIG
        config = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))

    return damage


def tensors(change):
    def damage(folder):
        found = safetensors.torch.load_file(folder / WEIGHTS)
        change(found)
        safetensors.torch.save_file(found, folder / WEIGHTS)

    return damage


def cut(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(lambda t: t[f"{Q}.lora_B"].fill_(torch.nan)), "holds NaN or infinite"),
        (tensors(lambda t: t["router.bias"].fill_(torch.inf)), "router.bias holds NaN or infinite"),
        (tensors(lambda t: t.pop(f"{Q}.lora_A")), "other names or shapes"),
        (tensors(lambda t: t.update({f"{Q}.lora_A": torch.tensor(1.0)})), "other names or shapes"),
        (tensors(lambda t: t.pop("router.weight")), "other names or shapes"),
        (tensors(lambda t: t.update(more=torch.zeros(1))), "other names or shapes"),
        (tensors(lambda t: t.update({"router.bias": torch.zeros(3).long()})), "holds NaN or inf"),
        (edit(domains=["Towns"]), "other names or shapes"),
        (edit(domains=["Towns", 3]), "domains must be"),
        (edit(layer=2), "a layer from 0 to 1, got 14 and 2"),
        (edit(layer=None), "layer must be int"),
        (edit(schema=-1), "schema must be 1, got -1"),
        (edit(alpha={}), "got 0 and 0"),
        (edit(alpha={"../../x": 6.0}), "no plain linear '../../x'"),
        (edit(alpha={Q: float("inf")}), "alpha must be"),
        (edit(fingerprint="0" * 16), "trained on weights with fingerprint 0000"),
        (cut(CONFIG), "truncated or damaged"),
        (cut(WEIGHTS), "truncated or damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    ],
)
def test_damaged_folders_are_refused_and_the_model_is_as_it_was(saved, damage, message):
    base, _, batch, folder = saved
    damage(folder)
    with torch.no_grad():
        before = answer_states(base, batch).hidden
        with pytest.raises(ValueError, match=message):
            load_adapter(base, folder)
        assert torch.equal(answer_states(base, batch).hidden, before)
    assert not routed(base)


def test_what_diverged_is_not_saved(saved):
    _, model, _, folder = saved
    shutil.rmtree(folder)
    with torch.no_grad():
        routed(model)[Q].lora_B[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"q_proj\.lora_B holds NaN.*diverged\. Nothing was written"
    ):
        save_routed(model, folder, {})
    assert not folder.exists()


def test_domains_are_those_of_the_records_or_their_topics():
    assert name_domains(FORGOTTEN) == (["Towns", "hamlets"], DOMAINS, "domain")
    bare = [
        replace(qa, domain=None, topic=topic) for qa, topic in zip(FORGOTTEN, "abbaa", strict=True)
    ]
    assert name_domains(bare) == (["a", "b"], [0, 1, 1, 0, 0], "topic")
    assert name_domains([replace(bare[0], domain="x"), *bare[1:]]) == (
        ["a", "b"], [0, 1, 1, 0, 0], "topic (1 of 5 records have a domain)",
    )  # fmt: skip
    names, numbers, source = name_domains([FORGOTTEN[0], *samples.FORGET[1:]])
    assert (names, numbers) == (["all"], [0] * 5)
    assert source.startswith("default, for not all have a domain or a topic (1 of 5")
    cased = [
        replace(qa, domain=name) for qa, name in zip(FORGOTTEN, ["B", "b ", "A"], strict=False)
    ]
    assert name_domains(cased) == (["B", "A"], [0, 0, 1], "domain")


def test_bad_settings(tokenizer):
    with pytest.raises(ValueError, match=r"threshold must be below 1 / \(q - 1\) = 2, got 2"):
        ALTER(threshold=2.0)
    with pytest.raises(ValueError, match="share must be a share above 0"):
        ALTER(share=0)
    with pytest.raises(ValueError, match="compat must be left out: there is no public code"):
        ALTER(retain="kl", compat="open-unlearning")
    model = samples.make_model(tokenizer)
    with pytest.raises(ValueError, match="layer must be one of the model's 2 decoder layers"):
        adapt(model, tokenizer, layer=2)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setting")
    samples.save_tiny(folder / "model", samples.RECORDS, heads=2, kv_heads=1)
    save_records(folder / "forget.jsonl", FORGOTTEN)
    save_records(folder / "retain.jsonl", samples.RETAIN)
    sets = [f"--data.{name}={folder / name}.jsonl" for name in ("forget", "retain")]
    quick = ["--train.steps=6", "--train.batch_size=3", "--train.lr=0.02"]
    return [f"--model.path={folder / 'model'}", *sets, *quick]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("project", [False, True])
def test_from_files_to_a_report(flags, tmp_path, capsys, project):
    out = tmp_path / "run"
    chosen = ["train", "--method=alter", *flags, f"--lora.project={project}".lower()]
    main([*chosen, f"--out={out}", "--objective.structure=0.5"])
    assert "alter: 2 domains to forget, by domain, of 2 to 3 records" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    name = "alter projected" if project else "alter"
    assert [row["method"] for row in results["methods"]] == ["before", name]
    assert name in (out / "report.html").read_text()
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    main(["eval", str(out), "--generate=false"])
    judged = json.loads((out / "eval" / "results.json").read_text())
    assert judged["metrics"]["forget"]["probability"] == pytest.approx(
        results["methods"][1]["forget_prob"], rel=1e-5
    )
    for command in ("merge", "verify", "refresh", "rollback"):
        with pytest.raises(SystemExit):
            main([command, str(out)])
        assert "no plain LoRA, to be merged" in capsys.readouterr().err
    assert not Path(out, "merged").exists()


def test_a_column_of_domains_that_no_record_has_is_refused_at_once(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                "--method=alter",
                *flags,
                "--data.domain_column=part",
                f"--out={tmp_path / 'x'}",
            ]
        )
    assert "no forget record has a 'part'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("without_figures", "short_answers")
def test_a_comparison_saves_and_judges_it(flags, tmp_path):
    out = tmp_path / "run"
    methods = ["--methods=[alter, alter projected]", "--seeds=1", "--examples=0"]
    main(["compare", *flags, *methods, f"--out={out}"])
    rows = json.loads((out / "results.json").read_text())["methods"]
    assert [row["method"] for row in rows] == ["before", "alter", "alter projected"]
    assert rows[1]["mean_retain_rank"] == 0 < rows[2]["mean_retain_rank"]
    assert rows[1]["forget_prob"] != rows[0]["forget_prob"]
