"""Linears whose weight a model reads without calling them: an adapter there would do nothing."""

import functools
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import nsru_kernels as nk

K = 8
READS = "reads its weight instead of calling it"


class Reader(nn.Module):
    """A block that uses one linear's weight in the given way, and calls the other."""

    def __init__(self, how):
        super().__init__()
        self.called, self.read, self.norm = nn.Linear(K, K), nn.Linear(K, K), nn.BatchNorm1d(K)
        self.how = how

    def forward(self, x):
        x = self.norm(self.called(x))
        match self.how:
            case "linear":
                return nn.functional.linear(x, self.read.weight)
            case "transposed":
                return x @ self.read.weight.T
            case "data":
                return x @ self.read.weight.data
            case "training":
                return x @ self.read.weight if self.training else self.read(x)
            case "forward":
                return self.read.forward(x)
            case "dtype":
                return self.read(x.to(self.read.weight.dtype))


def make(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), Reader(how)).eval()


class Named(nn.Module):
    """A model that takes its input by name."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("how", ["linear", "transposed", "data", "training"])
def test_what_nothing_calls_is_left_out_by_name_and_refused(how):
    model = Named(make(how)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"x": torch.randn(5, K)}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"'read' matches model\.1\.read, .*Reader {READS}"):
        nk.swap_linears(model, "read", rank=2, alpha=4, batch=batch)
    assert torch.equal(torch.get_rng_state(), random)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4, batch=batch)
    assert report.swapped == ["model.0", "model.1.called"]
    assert READS in report.skipped["model.1.read"]
    assert f"not swapped: read × 1 (Reader {READS}" in str(report)
    assert not model.training
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert "forward" not in vars(model.model[1].read)


@pytest.mark.parametrize("how", ["forward", "dtype"])
def test_what_takes_part_is_swapped(how):
    batch = {"x": torch.randn(5, K)}
    report = nk.swap_linears(Named(make(how)), "all-linear", rank=2, alpha=4, batch=batch)
    assert report.swapped == ["model.0", "model.1.called", "model.1.read"]


def encoder():
    layer = nn.TransformerEncoderLayer(K, 2, 12, batch_first=True)
    return Named(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def test_fast_path_of_the_transformer_encoder():
    """In eval mode it reads linear1 and linear2, which it calls in training."""
    batch = {"x": torch.randn(2, 5, K)}
    with pytest.raises(ValueError, match=r"no linear layer that can be swapped .*reads its weight"):
        nk.swap_linears(encoder(), "all-linear", rank=2, alpha=4, batch=batch)
    with pytest.raises(ValueError, match=rf"linear1.*TransformerEncoderLayer {READS}"):
        nk.estimate_retain_subspaces(encoder(), [batch], "linear1", width=4, rank=2)


def test_subspaces_and_the_swap_leave_out_the_same():
    model = Named(make("linear"))
    batches = [{"x": torch.randn(5, K)} for _ in range(3)]
    subspaces = nk.estimate_retain_subspaces(
        model, batches, "all-linear", width=4, rank=2, progress=False
    )
    assert list(subspaces) == ["model.0", "model.1.called"]
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4, subspaces=subspaces)
    assert report.swapped == list(subspaces)
    assert READS in report.skipped["model.1.read"]


def test_two_parameters_on_one_storage_are_not_taken_for_a_reader():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(6, K), nn.Linear(K, 6)
    model.head.weight = nn.Parameter(model.embed.weight.data)
    model.forward = lambda ids: model.head(model.embed(ids))
    stream = nk.nn.inputs.ActivationStream(model, {"head": model.head})
    assert stream.read_elsewhere({"ids": torch.tensor([[1, 2]])}) == {}


LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip


class DecodingMLP(LlamaMLP):
    """One that reads its weights for a token on a KV cache, as code for fast generation does."""

    def forward(self, x):
        if x.shape[1] > 1:
            return super().forward(x)
        return nn.functional.silu(x @ self.gate_proj.weight.T) @ self.down_proj.weight.T


def test_weights_that_are_read_in_decoding_alone():
    model = LlamaForCausalLM(LLAMA).eval()
    for layer in model.model.layers:
        layer.mlp = DecodingMLP(LLAMA)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    ends = {name.rpartition(".")[2] for name in report.swapped}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    assert f"DecodingMLP {READS}" in report.skipped["model.layers.1.mlp.gate_proj"]


class Branching(Named):
    def forward(self, x):
        return self.model(torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)))


def test_models_with_higher_order_operators():
    """The look neither fails at them nor leaves something in Dynamo's caches."""
    model, batch = Branching(make("linear")).eval(), {"x": torch.randn(5, K)}
    expected = model(**batch)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4, batch=batch)
    assert f"Reader {READS}" in report.skipped["model.1.read"]
    torch.testing.assert_close(model(**batch), expected)


def test_a_pytorch_that_cannot_look_into_them_is_said(monkeypatch):
    """Before modes had the switch every one of them was refused."""
    looker = nk.nn.inputs._WeightReads
    monkeypatch.setattr(looker, "supports_higher_order_operators", False)
    model, batch = Branching(make("data")).eval(), {"x": torch.randn(5, K)}
    with pytest.warns(UserWarning, match="cannot look into higher-order operators"):
        report = nk.swap_linears(model, "all-linear", rank=2, alpha=4, batch=batch)
    assert "model.1.read" in report.swapped


@pytest.mark.parametrize("attention", ["flex_attention", "sdpa", "eager"])
def test_every_attention_can_be_estimated_and_swapped(attention):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    model.set_attn_implementation(attention)
    batch = {"input_ids": torch.randint(32, (2, 6))}
    with torch.no_grad():
        expected = model(**batch).logits
    subspaces = nk.estimate_retain_subspaces(
        model, [batch], "all-linear", width=8, rank=2, progress=False
    )
    nk.swap_linears(model, "all-linear", rank=2, alpha=4, subspaces=subspaces)
    assert len(subspaces) == 14
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)


class FusedLoss(LlamaForCausalLM):
    """One that reads its head's weight for a loss, as Liger's cross-entropy does."""

    def forward(self, input_ids, labels=None, **options):
        if labels is None:
            return super().forward(input_ids, **options)
        logits = self.model(input_ids, **options)[0] @ self.lm_head.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_head_that_is_read_for_a_loss():
    with pytest.raises(ValueError, match=rf"'lm_head' .*FusedLoss {READS}"):
        nk.swap_linears(FusedLoss(LLAMA), ["q_proj", "lm_head"], rank=2, alpha=4)


class Penalised(LlamaForCausalLM):
    """One whose loss looks at weights that its forward calls."""

    def forward(self, input_ids, labels=None, **options):
        found = super().forward(input_ids, labels=labels, **options)
        if labels is not None:
            found.loss += 1e-3 * self.lm_head.weight.norm()
        return found


def test_what_is_called_may_be_looked_at_besides():
    report = nk.swap_linears(Penalised(LLAMA), ["q_proj", "lm_head"], rank=2, alpha=4)
    assert "lm_head" in report.swapped


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def jamba():
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, num_experts=2, use_mamba_kernels=False, mamba_d_state=4,
        mamba_dt_rank=4,
    )  # fmt: skip
    return JambaForCausalLM(config)


@pytest.mark.parametrize("make_model", [mamba, jamba])
def test_time_steps_of_mamba(make_model):
    model = make_model()
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert not any(name.endswith("dt_proj") for name in report.swapped)
    assert any(name.endswith("x_proj") for name in report.swapped)
    [name] = [name for name in report.skipped if name.endswith("dt_proj")]
    assert "Mixer" in report.skipped[name]
    assert READS in report.skipped[name]


def assert_peft_loads(model, base, report, folder):
    """What the swapped model exports gives its logits in PEFT, by adapters of the same layers."""
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B)
    nk.save_lora_adapter(model, folder)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    ids = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert sorted(report.swapped) == sorted(loaded.targeted_module_names)


def test_what_is_exported_of_mamba_is_what_peft_loads(tmp_path):
    model = mamba()
    with pytest.raises(ValueError, match="PEFT refuses"):
        nk.swap_linears(model, ["in_proj", "out_proj"], rank=2, alpha=4)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert_peft_loads(model, mamba(), report, tmp_path)


def qwen3_moe():
    """Two layers, a dense one and one of experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def test_what_is_exported_beside_fused_experts_is_what_peft_loads(tmp_path):
    model = qwen3_moe()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj.*that of fused expert"):
        nk.swap_linears(model, ["gate_proj"], rank=2, alpha=4)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert {name.rpartition(".")[2] for name in report.swapped} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert_peft_loads(model, qwen3_moe(), report, tmp_path)


def test_the_report_names_fused_experts_with_their_share():
    model = qwen3_moe()
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = 4 * 3 * 16 * 8
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert report.skipped["model.layers.1.mlp.experts"].startswith("fused experts, ")
    assert f"not swapped: experts × 1 (fused experts, {experts / total:.0%} of all" in str(report)


def test_fused_experts_are_known_by_their_class_too():
    config = JetMoeConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_key_value_heads=2, kv_channels=4, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    report = nk.swap_linears(JetMoeForCausalLM(config), "all-linear", rank=2, alpha=4)
    names = {n for n, why in report.skipped.items() if why.startswith("fused experts, ")}
    assert names == {
        f"model.layers.0.{part}.{which}_linear"
        for part in ("mlp", "self_attention.experts") for which in ("input", "output")
    }  # fmt: skip


@pytest.mark.parametrize(
    "hold",
    [
        lambda read: [read],
        lambda read: {"own": (read, "name")},
        lambda read: read.forward,
        lambda read: (read,),
        lambda read: {read},
        lambda read: functools.partial(read),
        lambda read: lambda x: read(x),
        lambda read: lambda x, layer=read: layer(x),
        lambda read: SimpleNamespace(layers=[read]),
        lambda read: functools.lru_cache(lambda: read),
    ],
    ids=[
        "list",
        "dict",
        "method",
        "tuple",
        "set",
        "partial",
        "closure",
        "default",
        "object",
        "cache",
    ],
)
def test_what_is_held_by_hand_is_left_out_by_name_and_refused(hold):
    """PyTorch registers no module of a list; a swap would not reach it there."""
    model = make("dtype")
    model[1].kept = hold(model[1].read)
    with pytest.raises(ValueError, match=r"1\.read, which .*: 1\.kept holds it too"):
        nk.estimate_retain_subspaces(model, [torch.randn(5, K)], "read", width=4, rank=2)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert report.swapped == ["0", "1.called"]
    assert report.skipped["1.read"] == "1.kept holds it too, and would go on calling it as it is"


def test_parents_may_be_held_by_hand():
    model = make("dtype")
    model[1].kept = [model[0], "and more"]
    model.blocks = [model[1]]
    assert nk.swap_linears(model, "all-linear", rank=2, alpha=4).swapped == ["1.called", "1.read"]


class Router(nn.Module):
    """As DBRX, JetMoe and Switch have it: a linear layer inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x).softmax(-1)


class ExpertBlock(nn.Module):
    """Experts in one matrix, as DBRX has them, chosen by a router; and one that is called so."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.router_gate = Router(), nn.Linear(8, 8), nn.Linear(8, 4)
        self.w1 = nn.Parameter(torch.randn(4 * 8, 8))

    def forward(self, x):
        weights = self.first(x) + self.router_gate(x)
        y = (x @ self.w1.T).unflatten(-1, (4, 8))
        return self.second((weights[..., None] * y).sum(-2))


def test_routers_are_left_alone_unless_they_are_named():
    report = nk.swap_linears(model := ExpertBlock(), "all-linear", rank=2, alpha=4)
    assert report.swapped == ["second"]
    for name in ("first.layer", "router_gate"):
        assert report.skipped[name] == "router of experts; name it to swap it"
    nk.merge_adapters(model)
    report = nk.swap_linears(model, ["second", "router_gate"], rank=2, alpha=4)
    assert report.swapped == ["second", "router_gate"]


class OutputGate(nn.Module):
    """Routes nothing: there are no experts."""

    def __init__(self):
        super().__init__()
        self.proj, self.router = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x * self.proj(x).sigmoid() * self.router(x)


@pytest.mark.parametrize("settings", [{}, {"num_local_experts": 4}])
def test_gates_without_experts_are_no_routers(settings):
    model = nn.Sequential(OutputGate())
    model.config = SimpleNamespace(**settings)
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert report.swapped == (["0.proj"] if settings else ["0.proj", "0.router"])


def test_matrices_that_are_no_layers_are_named_with_their_share():
    model = nn.ModuleDict({"block": ExpertBlock(), "embed": nn.Embedding(30, 8)})
    share = 4 * 8 * 8 / sum(p.numel() for p in model.parameters())
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    why = f"matrices that are no linear layers, {share:.0%} of all parameters; no adapter reaches"
    assert report.skipped["block"].startswith(why)
    model["embed"] = nn.Embedding(100_000, 8)  # then they hold next to nothing
    nk.merge_adapters(model)
    assert "block" not in nk.swap_linears(model, "all-linear", rank=2, alpha=4).skipped


def test_batches_may_be_made_by_the_model_itself():
    model = make("dtype")
    batches = [torch.randn(n, K) for n in (3, 4, 5)]

    def make_them():
        for batch in batches:
            model(torch.randn(50, K))
            yield batch

    sizes = {"width": 8, "rank": 2}
    wanted = nk.estimate_retain_subspaces(model, batches, "all-linear", **sizes)
    found = nk.estimate_retain_subspaces(model, make_them(), "all-linear", **sizes)
    assert [entry.tokens for entry in found.inputs] == [12] * len(wanted.inputs)
    assert found.inputs == wanted.inputs


def test_another_thread_may_run_other_models_meanwhile():
    """Hooks on all modules of the process saw those of other threads, too."""
    model, other = make("dtype"), nn.Sequential(*[nn.Linear(K, K) for _ in range(20)])
    ended = threading.Event()

    def serve():
        with torch.no_grad():
            while not ended.is_set():
                other(torch.randn(2, K))

    wanted = nk.estimate_retain_subspaces(
        model, [torch.randn(5, K)], "all-linear", width=4, rank=2
    ).keys()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(40):
            batches = [torch.randn(5, K) for _ in range(3)]
            found = nk.estimate_retain_subspaces(model, batches, "all-linear", width=4, rank=2)
            assert found.keys() == wanted
    finally:
        ended.set()
        thread.join()
