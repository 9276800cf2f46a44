"""estimate_retain_subspaces on a small Llama and on plain modules."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from linear_cases import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from nsru_kernels import swap_linears
from nsru_kernels.subspaces import estimate_retain_subspaces

QKV = ("q_proj", "k_proj", "v_proj")
# Widths at which K=80 takes the covariance route, or one that holds 16 directions at most.
EXACT, NYSTROM = 24, 16
TARGETS = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model():
    return tiny_llama(vocab_size=50, intermediate_size=80, attention_dropout=0.5)


def make_batches(count=4, seed=0, rows=4, length=10, low=0, high=50):
    """Right-padded batches with labels, as a collator makes them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(low, high, (rows, length), generator=generator)
        lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return batches


def inputs_of(model, name, batches):
    """The unpadded inputs of one module [M, K], by an independent hook."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    model.train(was_training)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]).double()


def estimate(model, batches, targets="all-linear", **options):
    return estimate_retain_subspaces(
        model, batches, targets, **({"width": EXACT, "progress": False} | options)
    )


def test_a_model_that_peft_has_wrapped_is_refused(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"wrapped by PEFT \(.*Estimate before PEFT wraps it"):
        estimate(wrapped, make_batches(), rank=8)


def test_subspaces_are_those_of_the_unpadded_activations(model):
    batches = make_batches()
    subspaces = estimate(model, batches, rank=5)
    assert len(subspaces) == 14
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = inputs_of(model, name, batches)
        subspace = subspaces[name]
        assert subspace.tokens == len(x)
        assert subspace.trace == pytest.approx(x.square().sum().item(), rel=1e-6)
        values = torch.linalg.eigvalsh(x.T @ x).flip(0)
        torch.testing.assert_close(subspace.eigenvalues, values[:5], rtol=1e-5, atol=0)


def test_readers_of_one_tensor_share_one_subspace(model):
    subspaces = estimate(model, make_batches(), rank=5)
    groups = [[name.rpartition(".")[2] for name in entry.modules] for entry in subspaces.inputs]
    assert groups == [list(QKV), ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    for entry in subspaces.inputs:
        assert len({id(subspaces[name]) for name in entry.modules}) == 1
    assert len({id(subspace) for subspace in subspaces.values()}) == 8
    layer = "model.layers.0.self_attn."
    assert subspaces[layer + "q_proj"] is not subspaces["model.layers.1.self_attn.q_proj"]


class Two(nn.Module):
    """Two linears; the second reads what ``second`` makes of the first one's input."""

    def __init__(self, second):
        super().__init__()
        self.q, self.k, self.second = nn.Linear(8, 4), nn.Linear(8, 4), second

    def forward(self, x):
        x = x.clone()
        return self.q(x) + self.k(self.second(x))


def test_a_tensor_that_was_changed_in_place_is_another_input():
    torch.manual_seed(0)
    batch = torch.randn(40, 8) @ torch.diag(torch.tensor([1.0] * 3 + [0.0] * 5))
    model = Two(lambda x: x.copy_(x.flip(-1)))
    subspaces = estimate(model, [(batch.clone(),)], rank=3)
    assert subspaces["q"] is not subspaces["k"]
    for name, rows in (("q", batch), ("k", batch.flip(-1))):
        left = rows - rows @ subspaces[name].basis @ subspaces[name].basis.T
        assert left.norm() <= 1e-5 * rows.norm()


def test_linears_that_share_an_input_in_some_batches_only():
    """As a cross-attention that reads its own states where there are no encoder's."""
    torch.manual_seed(0)
    model = Two(lambda x: x.flip(-1) if len(x) == 20 else x)
    same, other = torch.randn(10, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match=r"k reads the same tensor as q in the first.*begin with"):
        estimate(model, [(same,), (other,)], rank=3)
    with pytest.raises(ValueError, match="k reads the same tensor as q in the first"):
        estimate(model, [(same,)], forget_batches=[(other,)], min_editability=0.1)
    subspaces = estimate(model, [(other,), (same,)], rank=3)
    for name, rows in (("q", [other, same]), ("k", [other.flip(-1), same])):
        x = torch.cat(rows)
        wanted = torch.linalg.eigvalsh(x.T.double() @ x.double()).flip(0)[:3]
        torch.testing.assert_close(subspaces[name].eigenvalues, wanted, rtol=1e-5, atol=0)


def test_targets_restrict_the_work(model):
    subspaces = estimate(model, make_batches(), ["v_proj"], rank=5)
    assert list(subspaces) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    with pytest.raises(ValueError, match="v_proj"):
        estimate(model, make_batches(), ["v_prj"], rank=5)


def test_every_batch_is_read_once(model):
    batches = make_batches()
    whole = estimate(model, batches, rank=5)
    streamed = estimate(model, iter(batches), rank=5)
    for name, subspace in whole.items():
        assert torch.equal(streamed[name].basis, subspace.basis)
        assert streamed[name].tokens == subspace.tokens


def test_energy_takes_the_smallest_rank(model):
    batches = make_batches()
    for entry in estimate(model, batches, energy=0.8).inputs:
        shares = list(itertools.accumulate(entry.spectrum))
        assert shares[entry.rank - 1] >= 0.8
        assert entry.rank == 1 or shares[entry.rank - 2] < 0.8
        assert entry.captured_energy == pytest.approx(shares[entry.rank - 1])
        assert entry.editability is None


def test_editability_is_the_open_share_of_forget_energy(model):
    retain, forget = make_batches(high=25), make_batches(seed=1, low=25)
    subspaces = estimate(model, retain, rank=5, forget_batches=iter(forget))
    for entry in subspaces.inputs:
        x = inputs_of(model, entry.name, forget)
        basis = subspaces[entry.name].basis.double()
        left = x - (x @ basis) @ basis.T
        want = (left.square().sum() / x.square().sum()).item()
        assert entry.editability == pytest.approx(want, abs=1e-6)
        shares = entry.editability_by_rank
        assert shares[0] == 1
        assert len(shares) == len(entry.spectrum) + 1
        assert all(a >= b for a, b in itertools.pairwise(shares))


def test_min_editability_takes_the_largest_rank(model):
    retain, forget = make_batches(high=25), make_batches(seed=1, low=25)
    subspaces = estimate(model, retain, min_editability=0.5, forget_batches=forget)
    assert {entry.rank for entry in subspaces.inputs} != {0}
    for entry in subspaces.inputs:
        shares = entry.editability_by_rank
        assert shares[entry.rank] >= 0.5
        assert entry.rank == len(shares) - 1 or shares[entry.rank + 1] < 0.5
    options = {"width": NYSTROM, "min_editability": 0.01, "forget_batches": forget}
    limited = estimate(model, retain, ["down_proj"], **options)
    assert [(entry.rank, entry.rank_limited) for entry in limited.inputs] == [(16, True)] * 2


def test_unit_tokens_count_alike(model):
    retain, forget = make_batches(high=25), make_batches(seed=1, low=25)
    options = {"rank": 5, "forget_batches": forget, "unit_tokens": True}
    for entry in estimate(model, retain, **options).inputs:
        x_r, x_f = (
            torch.nn.functional.normalize(inputs_of(model, entry.name, batches), dim=1)
            for batches in (retain, forget)
        )
        values, vectors = torch.linalg.eigh(x_r.T @ x_r)
        assert entry.captured_energy == pytest.approx((values[-5:].sum() / len(x_r)).item(), 1e-4)
        taken = (x_f @ vectors[:, -5:]).square().sum().item() / len(x_f)
        assert entry.editability == pytest.approx(1 - taken, abs=1e-3)


def test_one_massive_token_decides_only_without_unit_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4))
    x = torch.randn(1, 30, 12)
    x[:, 0] *= 1e4
    batches = [{"input": x}]
    options = {"min_editability": 0.3, "forget_batches": batches}
    by_energy = estimate(model, batches, ["0"], **options).inputs[0]
    by_token = estimate(model, batches, ["0"], unit_tokens=True, **options).inputs[0]
    assert by_energy.rank == 1, "never 0: something is always protected"
    assert by_energy.editability < 1e-6
    assert by_token.rank > 1
    assert by_token.editability >= 0.3


def test_unit_tokens_hide_no_bad_activation():
    model = nn.Sequential(nn.Linear(4, 2))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 3, 4)
        x[0, 1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            estimate(model, [{"input": x}], ["0"], rank=1, unit_tokens=True)


def test_alphas_undo_what_the_projection_takes(model):
    retain, forget = make_batches(high=25), make_batches(seed=1, low=25)
    subspaces = estimate(model, retain, rank=5, forget_batches=forget)
    alphas = subspaces.alphas(16.0)
    assert alphas.keys() == subspaces.keys()
    assert [len(name) for name in alphas] == sorted(map(len, alphas), reverse=True)
    for entry in subspaces.inputs:
        for module in entry.modules:
            assert alphas[module] ** 2 * entry.editability == pytest.approx(16.0**2)
    nothing_open = estimate(model, retain, rank=5, forget_batches=retain)
    for entry, e in zip(nothing_open.inputs, (0.0, 1e-8, 1e-3), strict=False):
        entry.editability = e
        assert {nothing_open.alphas(16.0)[name] for name in entry.modules} == {160.0}
    unmeasured = estimate(model, retain, rank=5)
    assert set(unmeasured.alphas(16.0).values()) == {16.0}


def test_token_mask_leaves_tokens_out(model):
    batches = make_batches()
    for batch in batches:
        batch["token_mask"] = batch["attention_mask"].bool()
        batch["token_mask"][:, 0] = False
    subspaces = estimate(model, batches, ["q_proj"], rank=5)
    name = "model.layers.1.self_attn.q_proj"
    count = sum(int(batch["token_mask"].sum()) for batch in batches)
    assert subspaces[name].tokens == count


def test_a_mask_that_is_added_to_scores_stands_beside_that_of_tokens(model):
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    batch["token_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    batch["attention_mask"] = torch.full((2, 1, 6, 6), -1e9).triu(1)
    subspaces = estimate(model, [batch], ["q_proj"], rank=2)
    assert {subspace.tokens for subspace in subspaces.values()} == {10}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), r"token_mask must be like input_ids, \(2, 6\), got \(2, 5\)"),
        (torch.full((2, 6), torch.nan), "token_mask must be bool or whole numbers"),
        (torch.full((2, 6), 0.5), "token_mask must be bool or whole numbers"),
        (torch.full((2, 6), -100), "token_mask must be bool or whole numbers"),
    ],
)
def test_a_token_mask_that_fits_no_tokens_is_refused_whatever_it_holds(model, mask, message):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "token_mask": mask}
    with pytest.raises(ValueError, match=message):
        estimate(model, [batch], rank=2)


class TimeFirst(nn.Module):
    """As PyTorch's own layers have it by default: states are [T, B, K]."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None, scale=None):
        return self.linear(self.embed(input_ids.T)).transpose(0, 1)


@pytest.mark.parametrize("length", [9, 3])
def test_the_mask_of_layers_that_read_time_first(length):
    torch.manual_seed(0)
    model, ids = TimeFirst(), torch.randint(20, (3, length))
    mask = (torch.arange(length) < torch.tensor([[length], [2], [1]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "scale": 1.0}
    subspaces = estimate(model, [batch], rank=3)
    x = model.embed(ids)[mask.bool()].double()
    assert subspaces["linear"].tokens == len(x)
    wanted = torch.linalg.eigvalsh(x.T @ x).flip(0)[:3]
    torch.testing.assert_close(subspaces["linear"].eigenvalues, wanted, rtol=1e-5, atol=0)


@pytest.fixture
def both():
    """An encoder-decoder."""
    config = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def test_padding_of_encoder_and_decoder_is_not_told_apart(both):
    ids, labels = torch.arange(12).reshape(2, 6), torch.arange(8).reshape(2, 4)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    subspaces = estimate(both, [batch], rank=2)
    assert {subspace.tokens for subspace in subspaces.values()} == {12}
    padded = torch.ones_like(ids)
    padded[0, 4:] = 0
    left_out = labels.clone()
    left_out[0, 3] = -100
    for name, others in (
        ("attention_mask", {"attention_mask": padded}),
        ("decoder_attention_mask", {"decoder_attention_mask": padded}),
        ("labels", {"labels": left_out, "decoder_input_ids": None}),
    ):
        with pytest.raises(ValueError, match=f"{name} leave .* padding of encoder and decoder"):
            estimate(both, [{**batch, **others}], rank=2)


def test_padding_of_encoder_states_is_not_told_apart():
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    batch["encoder_hidden_states"] = torch.randn(2, 4, 16)
    subspaces = estimate(GPT2LMHeadModel(config), [batch], ["c_attn"], rank=2)
    found = {name.split(".")[-2]: subspace.tokens for name, subspace in subspaces.items()}
    assert found == {"attn": 12, "crossattention": 8}
    batch["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="encoder_attention_mask leave tokens out"):
        estimate(GPT2LMHeadModel(config), [batch], ["c_attn"], rank=2)


def test_a_decoder_reads_labels(both):
    ids, labels = torch.arange(12).reshape(2, 6), torch.arange(1, 9).reshape(2, 4)
    found = estimate(both, [{"input_ids": ids, "labels": labels}], ["q"], rank=2)
    wanted = both.prepare_decoder_input_ids_from_labels(labels)
    given = estimate(both, [{"input_ids": ids, "decoder_input_ids": wanted}], ["q"], rank=2)
    decoders = [name for name in found if name.startswith("decoder")]
    assert {found[name].tokens for name in decoders} == {8}
    for name in decoders:
        torch.testing.assert_close(found[name].eigenvalues, given[name].eigenvalues)
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        estimate(both, [{"input_ids": ids}], ["q"], rank=2)


def test_an_empty_batch_adds_nothing(model):
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    nothing = {"input_ids": torch.ones(0, 6, dtype=torch.long)}
    alone = estimate(model, [batch], rank=2)
    both = estimate(model, [nothing, batch, nothing], rank=2)
    for name, subspace in alone.items():
        assert both[name].tokens == subspace.tokens
        assert torch.equal(both[name].basis, subspace.basis)


def test_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    subspaces = estimate(model, make_batches(), rank=5, forget_batches=make_batches(1))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(subspace.basis.requires_grad for subspace in subspaces.values())


def test_error_names_the_module_and_cleans_up(model):
    model.train()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN"):
        estimate(model, make_batches(), rank=5)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_input_that_is_zero_on_the_forget_set_is_open():
    """As of a dead layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    retain, forget = torch.rand(20, 4), -torch.rand(20, 4)
    found = estimate(model, [retain], ["2"], min_editability=0.5, forget_batches=[forget])
    assert found["2"].rank == 4
    assert found.inputs[0].editability == 1


def test_bad_forget_activations_are_refused(model):
    batch = make_batches(1)[0]

    def poisoned():
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = torch.inf
        yield batch | {"input_ids": torch.zeros_like(batch["input_ids"])}

    with pytest.raises(ValueError, match="forget activations"):
        estimate(model, make_batches(low=1), rank=5, forget_batches=poisoned())


def test_output_head_does_not_run_unless_asked_for(model):
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    estimate(model, make_batches(), rank=5)
    handle.remove()
    assert not calls
    assert estimate(model, make_batches(), ["lm_head"], rank=5)["lm_head"].rank == 5


def test_swap_takes_the_result_and_checks_the_weights(model):
    subspaces = estimate(model, make_batches(), TARGETS, rank=5)
    swap_linears(model, TARGETS, rank=2, alpha=4, subspaces=subspaces)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.normal_()
    subspaces.check_model(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="fingerprint"):
        subspaces.check_model(model)


def test_bf16_model_under_autocast(model):
    batches = make_batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        subspaces = estimate(
            model.bfloat16(), batches, rank=5, width=NYSTROM, forget_batches=batches
        )
    for entry in subspaces.inputs:
        basis = subspaces[entry.name].basis
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
        # On its own retain data, what is captured and what is open add up to the whole.
        total = entry.captured_energy + entry.editability
        exact = entry.in_features == 32
        assert total == pytest.approx(1, abs=1e-5) if exact else 0.8 < total <= 1 + 1e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 17, "width": 16}, "width=16"),
        ({"rank": 40, "width": 48}, "in_features=32"),
        ({"rank": -1}, "0 or more"),
        ({"energy": 1.1}, "energy"),
        ({"min_editability": 0.0, "forget_batches": [{}]}, "min_editability"),
        ({"min_editability": 0.1}, "needs forget_batches"),
    ],
)
def test_requests_are_checked_before_any_forward(model, options, match):
    def untouched():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(ValueError, match=match):
        estimate(model, untouched(), **options)


def test_empty_sets_are_refused(model):
    batch = make_batches(1)[0]
    nothing = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    for batches, options, match in (
        ([], {}, "retain set is empty"),
        ([nothing], {}, "retain set is empty"),
        ([batch], {"forget_batches": []}, "forget set is empty"),
    ):
        with pytest.raises(ValueError, match=match):
            estimate(model, batches, rank=5, **options)


class Branches(nn.Module):
    """Two readers of x, one of them called by keyword, and one that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, use_idle=False):
        y = self.first(x) + self.second(input=x)
        return self.idle(y) if use_idle else y


def test_plain_modules_work_too():
    x = torch.randn(40, 16)
    subspaces = estimate(Branches(), [{"x": x}], ["first", "second"], rank=3, width=8)
    assert subspaces["first"] is subspaces["second"]
    values = torch.linalg.eigvalsh(x.double().T @ x.double()).flip(0)
    torch.testing.assert_close(subspaces["first"].eigenvalues, values[:3], rtol=1e-5, atol=0)


def test_modules_that_no_batch_reached_are_named():
    batches = [{"x": torch.randn(40, 16)}]
    with pytest.raises(ValueError, match="1 of 2 inputs, the first idle"):
        estimate(Branches(), batches, rank=3, width=8)
    late = [*batches, {"x": torch.randn(5, 16), "use_idle": True}]
    assert estimate(Branches(), late, rank=3, width=8)["idle"].tokens == 5


def test_mask_that_does_not_fit_is_refused():
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"input of first: .*padding"):
        estimate(
            Branches(), [{"x": torch.randn(4, 16), "token_mask": mask}], ["first"], rank=3, width=8
        )


def rank_batches(rank):
    x = torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    return [[{"x": x[:50]}, {"x": x[50:]}], []][rank]


def estimate_on_rank(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    batches = rank_batches(rank)
    options = {"rank": 3, "width": 8, "forget_batches": batches}
    subspaces = estimate(Branches(), batches, ["first", "second"], **options)
    torch.save((subspaces["first"], subspaces.inputs), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_a_rank_may_have_no_batches(tmp_path):
    mp.spawn(estimate_on_rank, (f"{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    options = {"rank": 3, "width": 8, "forget_batches": rank_batches(0)}
    alone = estimate(Branches(), rank_batches(0), ["first", "second"], **options)
    for rank in range(2):
        subspace, inputs = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(subspace.basis, alone["first"].basis)
        assert inputs[0].modules == ["first", "second"]
        assert inputs[0].tokens == 90
        assert inputs[0].editability == pytest.approx(alone.inputs[0].editability, abs=1e-9)
