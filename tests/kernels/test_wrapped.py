"""NSRUWrappedLinear: adapters beside linears that compute their product by themselves."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from linear_cases import make_basis, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.nn.swap import match_linears
from nsru_kernels.nn.wrapped import affine_map, dense_linear, keep_unpacked, why_not_linear
from nsru_kernels.subspaces.collection import fingerprint_weights

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

K, N, R, Q = 24, 16, 3, 8
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # of float64
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # of adapters, which are float32


class Scaled(nn.Linear):
    """A subclass whose W is not its weight."""

    def forward(self, input):
        return 0.5 * F.linear(input, self.weight, self.bias)


class Named(nn.Linear):
    """A subclass whose W is its weight."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


class InBytes(nn.Module):
    """As GPTQ's and HQQ's layers are: no nn.Linear, and whole numbers with scales in buffers."""

    def __init__(self, k=K, n=N, bias=True):
        super().__init__()
        self.in_features, self.out_features = k, n
        self.register_buffer("codes", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(n, 1))
        self.bias = nn.Parameter(torch.randn(n)) if bias else None

    def dequantized(self):
        return self.codes * self.scales

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class Boxed(torch.Tensor):
    """A weight of a class of its own."""


def boxed():
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Boxed), requires_grad=False)
    return linear


# Kind → (the layer, W of the layer [N, K]).
KINDS = {
    "Conv1D": (lambda: Conv1D(N, K), lambda layer: layer.weight.T),
    "subclass": (lambda: Scaled(K, N), lambda layer: 0.5 * layer.weight),
    "subclass of its own weight": (lambda: Named(K, N), lambda layer: layer.weight),
    "in bytes": (InBytes, InBytes.dequantized),
    "no bias": (lambda: InBytes(bias=False), InBytes.dequantized),
    "class of weight": (boxed, lambda layer: layer.weight.as_subclass(torch.Tensor)),
}


@pytest.fixture(params=KINDS)
def case(request):
    """(model of one layer "proj", the same of an nn.Linear), both float64."""
    torch.manual_seed(0)
    make, weight_of = KINDS[request.param]
    own, plain = nn.Module(), nn.Module()
    own.proj = make().double()
    if own.proj.bias is not None:
        nn.init.normal_(own.proj.bias)
    plain.proj = nn.Linear(K, N).double()
    with torch.no_grad():
        plain.proj.weight.copy_(weight_of(own.proj))
        plain.proj.bias.copy_(own.proj(torch.zeros(K).double()))
    return own, plain


def swap(model, **options):
    nk.swap_linears(model, "proj", rank=R, alpha=6, subspaces={"proj": make_basis(K, Q)}, **options)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in (model.proj.lora_A, model.proj.lora_B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_what_it_computes_is_read_off_its_outputs(case):
    own, plain = case
    w_NK, bias_N = affine_map(own.proj)
    torch.testing.assert_close(w_NK, plain.proj.weight.detach(), **EXACT)
    torch.testing.assert_close(bias_N, plain.proj.bias.detach(), **EXACT)
    x = torch.randn(5, K).double()
    dense = dense_linear(own.proj, torch.float64)
    torch.testing.assert_close(dense(x), own.proj(x), **EXACT)
    assert (dense.bias is None) == (own.proj.bias is None)


def test_it_trains_as_a_plain_linear_does(case):
    models = case
    for model in models:
        swap(model)
    own, plain = (model.proj for model in models)
    assert type(own) is nk.NSRUWrappedLinear
    assert type(plain) is nk.NSRULinear
    optimizers = [torch.optim.AdamW([m.lora_A, m.lora_B], lr=1e-2) for m in (own, plain)]
    for _ in range(3):
        x = torch.randn(2, 5, K).double()
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [own(inputs[0]), plain(inputs[1])]
        torch.testing.assert_close(*outputs, **EXACT)
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)
        for name in ("lora_A", "lora_B"):
            ours, theirs = getattr(own, name), getattr(plain, name)
            torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    assert [name for name, p in models[0].named_parameters() if p.requires_grad] == [
        "proj.lora_A", "proj.lora_B",
    ]  # fmt: skip


def test_retained_inputs_come_out_as_before(case):
    model, _ = case
    basis = make_basis(K, Q)
    retained, forget = (basis @ torch.randn(Q, 4).double()).T, torch.randn(4, K).double()
    before = [model.proj(x).detach() for x in (retained, forget)]
    swap(model)
    torch.testing.assert_close(model.proj(retained), before[0], **CLOSE)
    assert (model.proj(forget) - before[1]).abs().max() > 1
    with nk.adapters_disabled(model):
        assert torch.equal(model.proj(forget), before[1])


def test_merged_it_is_its_own_kind_or_a_plain_linear(case):
    model, _ = case
    kind = type(model.proj)
    swap(model)
    with pytest.raises(ValueError, match=r"merge_adapters\(model\) does it for good"):
        model.proj.merge()
    x = torch.randn(5, K).double()
    y = model.proj(x).detach()
    if kind is Scaled:  # in memory it could be an nn.Linear, which nobody would read back
        with pytest.raises(ValueError, match=r"merge_adapters: proj: Scaled computes with .*Serve"):
            nk.merge_adapters(model)
        assert torch.equal(model.proj(x), y)
        return
    nk.merge_adapters(model)
    assert type(model.proj) is (kind if kind in (Conv1D, Named) else nn.Linear)
    torch.testing.assert_close(model.proj(x), y, **CLOSE)
    assert not any(p.requires_grad for p in model.parameters())


class HalfScales(InBytes):
    """As GPTQ's and AWQ's layers are, which compute in the dtype of their input."""

    def __init__(self):
        super().__init__(bias=False)
        self.scales = self.scales.half()

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_is_rounded_to_the_dtype_of_the_model_alone(dtype):
    model = nn.ModuleDict({"proj": HalfScales(), "other": nn.Linear(K, K, dtype=dtype)})
    exact_NK = model["proj"].codes.double() * model["proj"].scales.double()
    nk.swap_linears(model, "proj", rank=R, alpha=6)
    nn.init.normal_(model["proj"].lora_B)
    exact_NK += model["proj"].delta_weight().double()
    nk.merge_adapters(model)
    weight = model["proj"].weight.detach()
    assert weight.dtype == dtype
    off = (weight.double() - exact_NK).abs().max() / exact_NK.abs().max()
    assert off < torch.finfo(dtype).eps


def test_dropout_keeps_the_mean_and_its_mask_in_backward():
    torch.manual_seed(0)
    model = nn.Module()
    model.proj = InBytes().double()
    swap(model, dropout=0.5)
    x = torch.randn(1, K).double().expand(4000, K).clone().requires_grad_()
    model.train()
    torch.manual_seed(3)
    y = model.proj(x)
    expected = model.eval().proj(x[:1]).detach()
    assert (y.detach().mean(0) - expected).abs().max() < 0.2 * expected.abs().max()
    y.sum().backward()
    # y is linear in x for the mask that was drawn, so that backward has to hold to it.
    step = 1e-3 * torch.randn_like(x)
    torch.manual_seed(3)
    with torch.no_grad():
        moved = model.train().proj(x + step)
    torch.testing.assert_close((moved - y).sum(), (step * x.grad).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_layer_inside(dtype):
    model = nn.Module()
    model.proj = Conv1D(N, K)
    inside = copy.deepcopy(model.proj)
    swap(model)
    x = torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model.proj(x)
        assert y.dtype == inside(x).dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == model.proj.lora_A.grad.dtype == torch.float32
    wide = model.proj(x)
    assert (y - wide).abs().max() < 0.05 * wide.abs().max()
    for module in (model.proj.base_layer, inside):
        module.to(dtype)
    assert model.proj(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_it_gives_the_same_gradients(reentrant):
    model = nn.Module()
    model.proj = InBytes()
    swap(model)
    grads = []
    for run in (model.proj, lambda x: checkpoint(model.proj, x, use_reentrant=reentrant)):
        x = torch.ones(3, K, requires_grad=True)
        model.proj.lora_A.grad = None
        run(x).square().sum().backward()
        grads.append((x.grad, model.proj.lora_A.grad))
    torch.testing.assert_close(*grads)


def test_a_copied_model_has_a_layer_of_its_own():
    model = nn.Module()
    model.proj = InBytes()
    swap(model)
    other = copy.deepcopy(model)
    x, before = torch.randn(2, K), model.proj(torch.ones(2, K)).detach()
    with torch.no_grad():
        other.proj.lora_B.zero_()
        torch.testing.assert_close(other.proj(x), other.proj.base_layer(x))
    assert torch.equal(model.proj(torch.ones(2, K)), before)
    assert "bias=True" in repr(model.proj)
    assert nk.NSRUWrappedLinear(InBytes(bias=False), R, alpha=6).extra_repr()


class Squared(nn.Linear):
    def forward(self, input):
        return super().forward(input).square()


class Detached(nn.Linear):
    def forward(self, input):
        return super().forward(input.detach())


class Chatty(nn.Linear):
    def forward(self, input):
        return super().forward(input), None


def layer_of(function):
    """A linear layer whose forward is function(linear, x)."""

    class Odd(nn.Linear):
        calls = 0

        def forward(self, input):
            self.calls += 1
            return function(lambda x: F.linear(x, self.weight, self.bias), input, self.calls)

    return Odd(K, N)


@pytest.mark.parametrize(
    "function",
    [
        lambda linear, x, _: linear(x + 0.1 * x.mean(-2, keepdim=True)),
        lambda linear, x, _: linear(x - x.mean(0)) if len(x) > 1 else linear(x),
        lambda linear, x, _: linear(x.cumsum(1) if x.dim() > 2 else x),
        lambda linear, x, _: linear(x) + 0.2 * x.square().mean(-1, keepdim=True),
        lambda linear, x, _: torch.cat([linear(x[..., :4, :]), linear(x[..., 4:, :]).relu()], -2),
        lambda linear, x, calls: linear(x) * (1 + 0.1 * calls),
        lambda linear, x, _: linear(x) + 0.1 * torch.randn(N),
        lambda linear, x, _: linear(x).clamp(-2, 2),
    ],
    ids=["mixes tokens", "mean of a batch", "sum of those before", "grows with x", "first four",
         "counts calls", "random", "bounded"],
)  # fmt: skip
def test_what_only_looks_linear_is_left_alone(function):
    model = nn.ModuleDict({"proj": layer_of(function), "other": nn.Linear(K, K)})
    with pytest.raises(ValueError, match=r"proj, which cannot be swapped: Odd does not compute x"):
        nk.swap_linears(model, "proj", rank=R, alpha=6)


class Counting(nn.Linear):
    """A subclass that keeps account of its calls and of what it has seen."""

    def __init__(self):
        super().__init__(K, N)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", torch.full((), torch.nan))

    def forward(self, input):
        self.calls += 1
        self.largest.copy_(input.detach().abs().max())
        return super().forward(input)


@pytest.mark.parametrize("training", [True, False])
def test_a_trial_leaves_buffers_as_they_were(training):
    model = nn.ModuleDict({"proj": Counting()}).train(training)
    nk.swap_linears(model, "proj", rank=R, alpha=6)
    layer = model["proj"].base_layer
    assert layer.calls == 0
    assert layer.largest.isnan()
    assert layer.training == training


class Packing(nn.Linear):
    """As some kernels of GPTQ: the first call turns what is held into another layout for good."""

    def __init__(self):
        super().__init__(K, N)
        self.register_buffer("packed", torch.zeros(0))

    def forward(self, input):
        if not self.packed.numel():
            self.packed = self.weight.detach().T.contiguous()
        return input @ self.packed + self.bias


def test_what_packs_its_buffers_once_is_swapped_and_stays_packed():
    model = nn.ModuleDict({"proj": Packing()})
    nk.swap_linears(model, "proj", rank=R, alpha=6)
    assert model["proj"].base_layer.packed.shape == (K, N)


class Dropping(nn.Linear):
    def forward(self, input):
        return super().forward(F.dropout(input, 0.1, self.training))


class InferenceOnly(nn.Linear):
    """As kernels of GPTQ that refuse training mode."""

    def train(self, mode=True):
        if mode:
            raise NotImplementedError
        return super().train(False)


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_of_its_own_is_left_alone(training):
    model = nn.ModuleDict({"proj": Dropping(K, N), "other": nn.Linear(K, K)}).train(training)
    reason = "Dropping gives other outputs at each call in training mode"
    with pytest.raises(ValueError, match=reason):
        nk.swap_linears(model, "proj", rank=R, alpha=6)
    assert model["proj"].training == training
    infers = nn.ModuleDict({"proj": InferenceOnly(K, N).eval()}).eval()
    assert nk.swap_linears(infers, "proj", rank=R, alpha=6).swapped == ["proj"]


def test_a_trial_leaves_the_random_state_as_it_was():
    layer = layer_of(lambda linear, x, _: linear(x) + torch.randn(N))
    before = torch.get_rng_state()
    assert why_not_linear(layer) == "Odd does not compute x Wᵀ + b"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Squared(K, K), "Squared does not compute x Wᵀ"),
        (lambda: Detached(K, K), "gradients do not pass through Detached"),
        (lambda: Chatty(K, K), r"Chatty gives no output \[\.\.\., N=24\]"),
        (lambda: nn.MultiheadAttention(K, 2).out_proj, "nn.MultiheadAttention reads its weight"),
        (lambda: Conv1D(K, K).to("meta"), "Conv1D is on no device yet"),
    ],
)  # fmt: skip
def test_what_is_not_linear_is_left_alone(make, reason):
    model = nn.ModuleDict({"proj": make(), "other": nn.Linear(K, K)})
    with pytest.raises(ValueError, match=f"'proj' matches proj, which cannot be swapped: {reason}"):
        nk.swap_linears(model, "proj", rank=R, alpha=6)
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6)
    assert report.swapped == ["other"]
    assert "proj" in report.skipped


def test_a_layout_of_torchao_without_a_backward_is_named():
    int4 = pytest.importorskip(
        "torchao.prototype.quantization.int4", reason="torchao is not installed"
    )
    from torchao.quantization import quantize_

    model = nn.ModuleDict({"proj": nn.Linear(64, 64)})
    quantize_(model, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    with pytest.raises(ValueError, match=r"Linear of Int4OpaqueTensor cannot .*derivative for"):
        nk.swap_linears(model, "proj", rank=R, alpha=6)


def test_a_layer_without_a_size_stays_so():
    model = nn.ModuleDict({"proj": nn.LazyLinear(K)})
    with pytest.raises(ValueError, match="its weight has no size yet; run the model once"):
        nk.swap_linears(model, "proj", rank=R, alpha=6)
    assert nn.parameter.is_lazy(model.proj.weight)


def unlearn(model, forget):
    """Three steps of gradient ascent."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        (-model(input_ids=forget, labels=forget).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_gpt2_from_estimate_to_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    retain, forget = torch.randint(61, (2, 4, 12)).unbind()
    model = copy.deepcopy(base)
    subspaces = nk.estimate_retain_subspaces(
        model, [{"input_ids": retain}], "all-linear", width=32, rank=6
    )
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6, subspaces=subspaces)
    assert len(report.swapped) == 8
    assert fingerprint_weights(model) == fingerprint_weights(base) == subspaces.fingerprint
    unlearn(model, forget)
    wanted = model(input_ids=forget).logits.detach()
    assert (wanted - base(input_ids=forget).logits).abs().max() > 0.1
    nk.save_lora_adapter(model, tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    again = copy.deepcopy(base)
    nk.load_lora_adapter(again, tmp_path)
    nk.merge_adapters(model)
    for other in (served, again.eval(), model):
        torch.testing.assert_close(other(input_ids=forget).logits, wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")  # in GPT-2's own layout
    reread = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(reread(input_ids=forget).logits, wanted, rtol=1e-4, atol=1e-5)


def _bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return lambda folder: _read(folder, quantization_config=BitsAndBytesConfig(**bits))


def _torchao(name, *arguments):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    how = TorchAoConfig(getattr(torchao, name)(*(make(torchao) for make in arguments)))
    return lambda folder: _read(folder, quantization_config=how)


def _hqq():
    """By HQQ itself: transformers does not quantise by it."""
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

    def load(folder):
        model = _read(folder)
        for name, linear in match_linears(model, "all-linear"):
            how = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
            layer = hqq.HQQLinear(linear, how, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, layer)
        return model

    return load


def _gptqmodel(monkeypatch, method, form):
    """Calibrated and written by GPT-QModel, read by transformers, as people do."""
    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it starts no pool of one
    from gptqmodel import GPTQModel, QuantizeConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def load(folder):
        written = folder / method
        if not written.is_dir():
            monkeypatch.chdir(folder)  # where it leaves its logs
            words = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, "0"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
            tokenizer.save_pretrained(folder)
            # Its packer of C++ takes minutes to compile.
            how = {"quant_method": method, "format": form, "pack_impl": "original"}
            model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=32, **how))
            ids = torch.randint(model.config.vocab_size, (16, 40)).tolist()
            model.quantize([{"input_ids": row, "attention_mask": [1] * 40} for row in ids])
            model.save(str(written))
        return _read(written, device_map={"": "cpu"})

    return load


def _read(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


# Kind → (what loads such a model, how far a merged one may be off: LLM.int8 rounds x too).
QUANTISED = {
    "nf4": (lambda _: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1e-5),
    "int8": (lambda _: _bitsandbytes(load_in_8bit=True), 0.03),
    "torchao int8": (lambda _: _torchao("Int8WeightOnlyConfig"), 1e-5),
    "torchao int4": (
        lambda _: _torchao(
            "IntxWeightOnlyConfig", lambda _: torch.int4, lambda ao: ao.PerGroup(32)
        ),
        1e-5,
    ),
    "hqq": (lambda _: _hqq(), 1e-5),
    "gptq": (lambda patch: _gptqmodel(patch, "gptq", "gptq"), 1e-5),
    "awq": (lambda patch: _gptqmodel(patch, "awq", "gemm"), 1e-5),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models(kind, tmp_path, monkeypatch):
    """From the estimate to PEFT and to a merge; what the base holds is as it was throughout."""
    peft = pytest.importorskip("peft")
    make, tolerance = QUANTISED[kind]
    load = make(monkeypatch)
    # Of sizes that AWQ can take: multiples of 64.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    tiny_llama(**sizes).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    retain, forget = torch.randint(model.config.vocab_size, (2, 4, 12)).unbind()
    before = model(input_ids=forget).logits.detach()
    subspaces = nk.estimate_retain_subspaces(
        model, [{"input_ids": retain}], "all-linear", width=64, rank=6
    )
    nk.swap_linears(model, "all-linear", rank=R, alpha=6, subspaces=subspaces)
    assert fingerprint_weights(model) == subspaces.fingerprint
    unlearn(model, forget)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):  # some name float16, by their scales
            assert module.leakage() < (1e-6 if module.dtype == torch.float32 else 1e-3)
    with nk.adapters_disabled(model):
        torch.testing.assert_close(model(input_ids=forget).logits, before)
    wanted = model(input_ids=forget).logits.detach()
    assert (wanted - before).abs().max() > 0.1
    nk.save_lora_adapter(model, tmp_path / "adapter")
    served = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    keep_unpacked(served)  # else another kernel, in bf16
    torch.testing.assert_close(served(input_ids=forget).logits, wanted, rtol=1e-4, atol=1e-4)
    nk.merge_adapters(model)
    off = (model(input_ids=forget).logits - wanted).abs().max()
    assert off < tolerance * (wanted - before).abs().max()


def _packs(model, monkeypatch):
    """As on a CPU with avx512_bf16, whatever this one has."""
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    if not layers:
        pytest.skip("this bitsandbytes packs nothing")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    return layers


def test_4_bit_layers_are_not_packed_where_gradients_must_pass(tmp_path, monkeypatch):
    """bitsandbytes packs them in a forward in eval mode, and is silent about the gradients."""
    load = QUANTISED["nf4"][0](monkeypatch)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    tiny_llama(**sizes).save_pretrained(tmp_path)
    ids = torch.randint(40, (3, 8))
    found = []
    for estimates in (True, False):
        model = load(tmp_path)
        layers = _packs(model, monkeypatch)
        basis = torch.eye(64, 2)
        if estimates:
            nk.estimate_retain_subspaces(
                model, [{"input_ids": ids}], "v_proj", width=8, rank=2, progress=False
            )
        nk.swap_linears(model, "v_proj", rank=2, alpha=4, subspaces=dict.fromkeys(
            [f"model.layers.{i}.self_attn.v_proj" for i in range(2)], basis))  # fmt: skip
        with torch.no_grad():
            model(input_ids=ids)
        assert not any(
            getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers
        )
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for after, fresh in zip(*found, strict=True):
        assert fresh.norm() > 0
        torch.testing.assert_close(after, fresh)


def test_4_bit_layers_that_are_packed_are_refused_with_the_remedy(tmp_path, monkeypatch):
    from nsru_kernels.nn import wrapped

    load = QUANTISED["nf4"][0](monkeypatch)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    tiny_llama(**sizes).save_pretrained(tmp_path)
    model = load(tmp_path)
    layer = _packs(model, monkeypatch)[0]

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_non_differentiable(y := x.clone())
            return y

    layer.weight.quant_state.packing_format_for_cpu = True
    monkeypatch.setattr(
        "bitsandbytes.matmul_4bit", lambda x, *_, **__: NoGradient.apply(x @ torch.eye(64))
    )
    assert "load the model again" in wrapped.why_not_linear(layer)
