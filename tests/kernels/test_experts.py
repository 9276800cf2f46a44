"""Adapters on fused experts, from estimate to merge, against dense weights in float64 and PEFT."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import nsru_kernels as nk
from nsru_kernels.nn.experts import NSRUExpertLinear
from nsru_kernels.subspaces.collection import fingerprint_weights
from tests.kernels.expert_cases import CHOSEN, EXPERTS, FAMILIES, HIDDEN, INNER, tiny_moe
from tests.tolerance import assert_close_to_exact

peft = pytest.importorskip("peft")
families = pytest.mark.parametrize("family", FAMILIES)
PARAMETERS = ("gate_up_proj", "down_proj")


def tokens(*shape, seed=1):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def estimate(model, batches, targets="experts", rank=4, **options):
    return nk.estimate_retain_subspaces(
        model, batches, targets, width=16, rank=rank, progress=False, **options
    )


def swap(model, targets="experts", *, std=0.5, **options):
    """Swapped, with updates that are not zero."""
    report = nk.swap_linears(model, targets, **{"rank": 2, "alpha": 4, **options})
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return report


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def experts_in(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NSRUExpertLinear)}


@families
def test_the_way_from_estimate_to_merge(family, tmp_path):
    model, ids = tiny_moe(family), tokens(3, 7)
    base, before = copy.deepcopy(model), logits(model, ids)
    targets = ["q_proj", "experts"]
    subspaces = estimate(model, [ids], targets)
    assert torch.equal(logits(model, ids), before)
    names = {f"model.layers.{i}.mlp.experts.{end}" for i in range(2) for end in PARAMETERS}
    assert names < set(subspaces)
    assert len({id(s) for s in subspaces.values()}) == 6
    subspaces.save(tmp_path / "subspaces")
    subspaces = type(subspaces).load(tmp_path / "subspaces")

    patterns = {"rank_pattern": {r"1\.mlp.*down_proj": 3}, "alpha_pattern": {"gate_up_proj": 7}}
    report = nk.swap_linears(model, targets, rank=2, alpha=4, subspaces=subspaces, **patterns)
    assert names < set(report.swapped)
    assert "fused experts" not in str(report)
    subspaces.check_model(model)
    torch.testing.assert_close(logits(model, ids), before)  # another order of sums
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(module.leakage() < 1e-6 for module in experts_in(model).values())

    trained = logits(model, ids)
    assert (trained - before).abs().max() > 0.01
    with nk.adapters_disabled(model):
        torch.testing.assert_close(logits(model, ids), before)
    nk.save_lora_adapter(model, tmp_path / "adapter")
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(in_peft, ids), trained)
    loaded = copy.deepcopy(base)
    assert set(nk.load_lora_adapter(loaded, tmp_path / "adapter").swapped) == set(report.swapped)
    torch.testing.assert_close(logits(loaded, ids), trained)
    nk.merge_adapters(model)
    torch.testing.assert_close(logits(model, ids), trained)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "_apply_gate"))
    torch.testing.assert_close(logits(in_peft.merge_and_unload(), ids), trained)


@pytest.mark.parametrize("target", PARAMETERS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_of_the_two_parameters(family, target, tmp_path):
    model, ids = tiny_moe(family), tokens(2, 5)
    base = copy.deepcopy(model)
    report = swap(model, f"layers.1.mlp.experts.{target}")
    assert list(experts_in(model)) == [f"model.layers.1.mlp.experts.{target}"]
    assert report.skipped["model.layers.1.mlp.experts"].startswith("fused experts, ")
    nk.save_lora_adapter(model, tmp_path)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(in_peft, ids), logits(model, ids))
    adapted = logits(model, ids)
    nk.merge_adapters(model)
    torch.testing.assert_close(logits(model, ids), adapted)
    assert list(model.state_dict()) == list(base.state_dict())


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_equal_dense_weights_in_float64(family, checkpointing):
    model, ids = tiny_moe(family), tokens(3, 6)
    base = copy.deepcopy(model).double()
    base.set_experts_implementation("eager")  # the others have no float64
    swap(model, subspaces=estimate(model, [tokens(2, 3, seed=5)]))
    model.double()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
    other = embeddings.detach().clone().requires_grad_()

    dense, factors = {}, {}
    for name, module in experts_in(model).items():
        a = module.lora_A.detach().clone().requires_grad_()
        b = module.lora_B.detach().clone().requires_grad_()
        projector = torch.eye(a.shape[1], dtype=a.dtype) - module.basis @ module.basis.mT.double()
        deltas = []
        for e in range(EXPERTS):
            of_expert = a[2 * e : 2 * e + 2] @ projector
            delta = module.scaling * b[:, e::EXPERTS] @ of_expert
            deltas.append(delta.T if family == "gpt_oss" else delta)
        dense[name] = base.get_parameter(name).detach() + torch.stack(deltas)
        factors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    exact = functional_call(base, dense, kwargs={"inputs_embeds": other}).logits
    got = model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-10)

    exact.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(embeddings.grad, other.grad, rtol=1e-6, atol=1e-7)
    for name, factor in factors.items():
        grad = model.get_parameter(name).grad
        assert factor.grad.any()
        torch.testing.assert_close(grad, factor.grad, rtol=1e-6, atol=1e-6 * grad.abs().max())


def test_a_step_holds_nothing_of_the_size_of_the_weights():
    model, saved = tiny_moe("mixtral"), []
    swap(model)
    weights = {module.weight.data_ptr() for module in experts_in(model).values()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model.layers[0].mlp(torch.randn(1, 3, HIDDEN)).square().sum().backward()
    # Ā and B of all experts are the largest.
    assert max(saved) <= 4 * EXPERTS * 2 * 2 * INNER < 4 * EXPERTS * INNER * HIDDEN


@families
def test_retain_tokens_stay_and_forget_tokens_move(family):
    model, retain, forget = tiny_moe(family), tokens(1, 5), tokens(1, 5, seed=9)
    # All that these five tokens are: 5 directions of 16, and at most 10 of 24 inside.
    of_layer = estimate(model, [retain], r".*gate_up_proj", rank=5)
    inside = estimate(model, [retain], r".*experts\.down_proj", rank=10)
    before = [logits(model, ids) for ids in (retain, forget)]
    swap(model, std=2, subspaces={**of_layer, **inside})
    kept, moved = [
        (logits(model, ids) - old).abs().max()
        for ids, old in zip((retain, forget), before, strict=True)
    ]
    assert kept < 1e-4 * before[0].abs().max()
    assert moved > 1000 * kept


def test_padding_is_no_part_of_what_is_retained():
    model, ids = tiny_moe("mixtral"), tokens(1, 6)
    padded = nn.functional.pad(ids, (0, 3))
    found = [
        estimate(model, [batch])
        for batch in (
            {"input_ids": ids},
            {"input_ids": padded, "attention_mask": (padded > 0).long()},
        )
    ]
    for name, subspace in found[0].items():
        other = found[1][name]
        assert subspace.tokens == other.tokens == (12 if "down" in name else 6)
        projectors = [s.basis @ s.basis.T for s in (subspace, other)]
        torch.testing.assert_close(*projectors, rtol=0, atol=1e-4)


def test_an_expert_that_reads_nothing_gets_no_gradient():
    model = tiny_moe("mixtral")
    swap(model)
    model(input_ids=tokens(1, 1)).logits.square().sum().backward()
    for module in experts_in(model).values():
        reached = module.lora_A.grad.view(EXPERTS, -1).any(1)
        assert reached.sum() == CHOSEN
        by_expert = module.lora_B.grad.view(module.out_features, 2, EXPERTS)
        assert torch.equal(by_expert.transpose(0, 2).flatten(1).any(1), reached)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_loses_no_more_than_peft(autocast, tmp_path):
    ids = tokens(3, 6)
    exact_model = tiny_moe("mixtral")
    swap(exact_model, std=0.2)
    nk.save_lora_adapter(exact_model, tmp_path)
    exact = logits(exact_model.double(), ids)

    base = tiny_moe("mixtral") if autocast else tiny_moe("mixtral").bfloat16()
    ours = copy.deepcopy(base)
    nk.load_lora_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, eager = logits(ours, ids), logits(theirs, ids)
        loss = ours(input_ids=ids, labels=ids).loss
    assert_close_to_exact(got, eager, exact, precision=torch.bfloat16)
    loss.backward()
    for module in experts_in(ours).values():
        assert module.lora_A.grad.dtype == torch.float32
        assert module.lora_A.grad.isfinite().all()


def test_layers_share_nothing_and_copies_are_their_own():
    model, ids = tiny_moe("mixtral"), tokens(2, 4)
    swap(model, subspaces=estimate(model, [ids]))
    before = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), before)
        with torch.no_grad():
            for module in experts_in(other).values():
                module.lora_A.zero_()
        assert not torch.equal(logits(other, ids), before)
    assert torch.equal(logits(model, ids), before)
    held = [t.data_ptr() for m in experts_in(model).values() for t in (m.lora_A, m.lora_B, m.basis)]
    assert len(set(held)) == len(held)


def test_generation_and_a_merge_for_a_time():
    model, ids = tiny_moe("mixtral"), tokens(1, 4)
    swap(model, std=2)
    options = {"max_new_tokens": 6, "do_sample": False}
    answer = model.generate(ids, **options)
    before = logits(model, ids)
    weights = {name: module.weight.clone() for name, module in experts_in(model).items()}
    for module in experts_in(model).values():
        module.merge()
    torch.testing.assert_close(logits(model, ids), before)
    for name, module in experts_in(model).items():
        module.unmerge()
        assert torch.equal(module.weight, weights[name])
    nk.merge_adapters(model)
    assert torch.equal(model.generate(ids, **options), answer)


@pytest.mark.parametrize("ends", [["experts.down_proj"], ["gate_up_proj", "experts.down_proj"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_peft_trained_is_read(family, ends, tmp_path):
    model, ids = tiny_moe(family), tokens(2, 5)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=ends,
        rank_pattern={"down_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    trained = peft.get_peft_model(copy.deepcopy(model), config).eval()
    trained.save_pretrained(tmp_path)
    report = nk.load_lora_adapter(model, tmp_path)
    assert len(report.swapped) == 2 + 2 * len(ends)
    torch.testing.assert_close(logits(model, ids), logits(trained, ids))


def test_adapters_on_experts_go_on_from_a_saved_folder(tmp_path):
    from nsru_kernels.hf.peft_format import copy_lora_adapter

    model, ids = tiny_moe("olmoe"), tokens(2, 5)
    other = copy.deepcopy(model)
    swap(model)
    nk.save_lora_adapter(model, tmp_path)
    nk.swap_linears(other, "experts", rank=2, alpha=4)
    copy_lora_adapter(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_all_linear_leaves_experts_out_and_says_how_to_have_them():
    model = tiny_moe("mixtral")
    share = 2 * EXPERTS * 3 * HIDDEN * INNER / sum(p.numel() for p in model.parameters())
    report = nk.swap_linears(copy.deepcopy(model), "all-linear", rank=2, alpha=4)
    assert not any("experts" in name for name in report.swapped)
    assert f"fused experts, {share:.0%} of all parameters; add 'experts' to" in str(report)
    report = nk.swap_linears(model, ["all-linear", "experts"], rank=2, alpha=4)
    assert sum("experts" in name for name in report.swapped) == 4
    assert "fused experts" not in str(report)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mlp.gate" in n)


def test_patterns_and_exclusions_reach_experts():
    model = tiny_moe("mixtral")
    report = nk.swap_linears(
        model, "experts", rank=2, alpha=4, exclude=["experts.down_proj"],
        rank_pattern={r"layers\.1\..*gate_up_proj": 3},
    )  # fmt: skip
    assert [len(m.lora_A) for m in experts_in(model).values()] == [2 * EXPERTS, 3 * EXPERTS]
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "excluded"


def test_what_cannot_be_adapted_is_refused_and_changes_nothing():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    other = Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=8, intermediate_size_mlp=8,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"feed_forward\.experts, which .*fused experts, \d+% of"):
        nk.swap_linears(other, "experts", rank=2, alpha=4)
    model = tiny_moe("mixtral")
    names, fingerprint = list(model.state_dict()), fingerprint_weights(model)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: dropout must be 0"):
        nk.swap_linears(model, ["q_proj", "experts"], rank=2, alpha=4, dropout=0.1)
    bases = {name: torch.eye(16, 2) for name in experts_in_names(model)}
    with pytest.raises(ValueError, match=r"experts\.down_proj: .*basis must be \[K=24, Q\]"):
        nk.swap_linears(model, "experts", rank=2, alpha=4, subspaces=bases)
    with pytest.raises(ValueError, match=r"no linear layer; .* write 'experts\.gate_up_proj'"):
        nk.swap_linears(model, "gate_up_proj", rank=2, alpha=4)
    assert list(model.state_dict()) == names
    assert fingerprint_weights(model) == fingerprint
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*without expert parallelism"):
        nk.swap_linears(model, "experts", rank=2, alpha=4)
    del model.model.layers[0].mlp.experts.has_gate
    with pytest.raises(ValueError, match=r"experts.* transformers before 5\.3; update it"):
        nk.swap_linears(model, "experts", rank=2, alpha=4)


def experts_in_names(model):
    return [n for n, p in model.named_parameters() if n.endswith(PARAMETERS) and p.dim() == 3]


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    model = tiny_moe("mixtral")
    swap(model)
    nk.save_lora_adapter(model, tmp_path)
    (tmp_path / "nsru.json").unlink()
    with pytest.raises(ValueError, match=r"has rank 8 .* says 2 for each of 2 experts"):
        nk.load_lora_adapter(tiny_moe("mixtral", num_local_experts=2), tmp_path)
    with pytest.raises(ValueError, match=r"\(16, 24\), the model has \(16, 20\); another base"):
        nk.load_lora_adapter(tiny_moe("gpt_oss", intermediate_size=20), tmp_path)


@families
def test_a_swapped_model_keeps_the_names_of_its_weights(family, tmp_path):
    """So that what others save of it, such as a trainer's checkpoint, is read as the base model."""
    model, ids = tiny_moe(family), tokens(2, 5)
    names, before = set(model.state_dict()), logits(model, ids)
    swap(model, ["q_proj", "experts"])
    assert names < set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), ids), before)

    saved, adapted = copy.deepcopy(model.state_dict()), logits(model, ids)
    other = tiny_moe(family)
    swap(other, ["q_proj", "experts"], std=0.1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not any(other.load_state_dict(saved))
    assert torch.equal(logits(other, ids), adapted)
    nk.merge_adapters(other)
    assert set(other.state_dict()) == names
    other.load_state_dict(tiny_moe(family).state_dict())
    assert torch.equal(logits(other, ids), before)
