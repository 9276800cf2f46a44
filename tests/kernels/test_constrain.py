"""constrain_peft: PEFT's own LoRA layers do what NSRULinear does, whatever PEFT does with them."""

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from linear_cases import make_basis, tiny_llama
from safetensors.torch import load_file
from torch import nn
from torch.optim import optimizer as optimizer_module

import nsru_kernels as nk
from nsru_kernels.hf import constrain
from nsru_kernels.hf.peft_format import WEIGHTS

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_cases import (  # noqa: E402
    ALL,
    a_of,
    adapted,
    ids,
    layers_of,
    leakages,
    loss_of,
    make_bases,
    trained,
    twins,
)

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64
LEAST = 1e-6  # of float32


@pytest.fixture(scope="module")
def llama():
    return tiny_llama().eval()


@pytest.fixture
def constrained(llama):
    """(model, bases)"""
    model = adapted(llama, targets=["q_proj", "down_proj"])
    bases = make_bases(model)
    nk.constrain_peft(model, bases)
    return model, bases


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def edit(model):
    """What leaks until it is projected: a step of an optimizer, by hand."""
    with torch.no_grad():
        for _, layer in layers_of(model):
            a_of(layer).add_(1)


def assert_confined(model, bases, bound=LEAST, adapter="default"):
    found = leakages(model, bases, adapter)
    assert max(found.values()) <= bound, found


def assert_same_training(wrapped, swapped, optimizer, steps=4):
    """Losses, gradients, A and B of both, step by step."""
    optimizers = [optimizer(trained(model)) for model in (wrapped, swapped)]
    for _ in range(steps):
        for model in (wrapped, swapped):
            torch.nn.utils.clip_grad_norm_(trained(model), 0.5)
        losses = [loss_of(model) for model in (wrapped, swapped)]
        torch.testing.assert_close(*losses, **EXACT)
        for loss, each in zip(losses, optimizers, strict=True):
            each.zero_grad()
            loss.backward()
        for name, layer in layers_of(wrapped):
            module = swapped.get_submodule(name)
            torch.testing.assert_close(a_of(layer).grad, module.lora_A.grad, **EXACT)
            b_NR = layer.lora_B["default"].weight
            torch.testing.assert_close(b_NR.grad, module.lora_B.grad, **EXACT)
        for each in optimizers:
            each.step()
        for name, layer in layers_of(wrapped):
            module = swapped.get_submodule(name)
            torch.testing.assert_close(a_of(layer), module.projected_adapter(), **EXACT)
            torch.testing.assert_close(layer.lora_B["default"].weight, module.lora_B, **EXACT)


def test_two_casts_before_it_is_saved(constrained, tmp_path):
    model, bases = constrained
    logits(model)

    def cast_twice(tensor):
        """As .bfloat16() and .float() where the memory comes back at the same address."""
        if tensor.is_floating_point():
            tensor.detach().numpy()[...] = tensor.detach().bfloat16().float().numpy()
        return tensor

    model._apply(cast_twice)
    model.save_pretrained(tmp_path)
    for name, a_RK in load_file(tmp_path / WEIGHTS).items():
        if "lora_A" in name:
            basis = bases[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
            assert (a_RK @ basis).norm() <= LEAST * a_RK.norm()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.5),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=False),
    ],
)
def test_trains_as_nsru_linear_does(optimizer):
    wrapped, swapped, _ = twins()
    assert_same_training(wrapped, swapped, optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"layers.0.*.q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"targets": ".*layers.1.*(q_proj|up_proj)"},
    ],
    ids=str,
)
def test_patterns_of_peft(options):
    wrapped, swapped, _ = twins(**options)
    assert_same_training(wrapped, swapped, lambda ps: torch.optim.AdamW(ps, lr=1e-2), steps=2)


def test_conv1d_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)).eval()
    wrapped = adapted(model, targets=["c_attn", "c_proj"], fan_in_fan_out=True)
    bases = make_bases(wrapped)
    nk.constrain_peft(wrapped, bases)
    loss_of(wrapped).backward()
    torch.optim.SGD(trained(wrapped), lr=0.1).step()
    assert_confined(wrapped, bases)
    before = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_quantised_bases(bits, tmp_path):
    """QLoRA: layers of PEFT's own for bitsandbytes, reentrant checkpoints."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**bits)
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(quantised), config)
    bases = {n: make_basis(layer.in_features, 6).float() for n, layer in layers_of(model)}
    nk.constrain_peft(model, bases)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_confined(model, bases)
    for name, layer in layers_of(model):
        delta = layer.get_delta_weight("default")
        assert (delta @ bases[name]).norm() < 1e-5 * delta.norm()


@pytest.mark.parametrize("own", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(llama, dtype, own):
    """PEFT's float32 adapters of a 16-bit model, and adapters that are 16-bit themselves."""
    model = copy.deepcopy(llama).to(dtype)
    wrapped, swapped, bases = twins(model, autocast_adapter_dtype=own is not None)
    stored = {a_of(layer).dtype for _, layer in layers_of(wrapped)}
    assert stored == {own or dtype}
    assert_confined(wrapped, bases, 5e-4 if dtype == torch.float16 else 4e-3)
    effect = (logits(swapped) - logits(model)).abs().max()
    assert (logits(wrapped) - logits(swapped)).abs().max() < 0.1 * effect
    optimizer = torch.optim.SGD(trained(wrapped), lr=0.1)
    for _ in range(3):
        loss_of(wrapped).backward()
        for name, layer in layers_of(wrapped):
            grad, basis = a_of(layer).grad.double(), bases[name].double()
            assert (grad @ basis).norm() <= 4e-3 * grad.norm()
        optimizer.step()
        assert_confined(wrapped, bases, 5e-4 if dtype == torch.float16 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(llama, dtype):
    wrapped, swapped, _ = twins(llama)
    with torch.autocast("cpu", dtype):
        ys = [model(input_ids=ids, labels=ids) for model in (wrapped, swapped)]
    torch.testing.assert_close(ys[0].logits, ys[1].logits, rtol=0.05, atol=0.02)
    for y in ys:
        y.loss.backward()
    for name, layer in layers_of(wrapped):
        expected = swapped.get_submodule(name).lora_A.grad
        assert (a_of(layer).grad - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(llama, use_reentrant):
    wrapped, _, bases = twins(llama)
    wrapped.train()
    for _ in range(2):
        loss_of(wrapped).backward()
    expected = [p.grad.clone() for p in trained(wrapped)]
    wrapped.zero_grad()
    wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    wrapped.enable_input_require_grads()
    for _ in range(2):
        loss_of(wrapped).backward()
    for parameter, grad in zip(trained(wrapped), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    torch.optim.SGD(trained(wrapped), lr=0.1).step()
    assert_confined(wrapped, bases)


def test_projected_once_a_step(llama, monkeypatch):
    launches = []

    def counted(lora_as, *args, **kwargs):
        launches.append(len(lora_as))
        return nk.project_adapters(lora_as, *args, **kwargs)

    monkeypatch.setattr(constrain, "project_adapters", counted)
    model, _, _ = twins(llama)
    layers = len(layers_of(model))
    assert launches == [layers]
    optimizer = torch.optim.AdamW(trained(model))
    for step in range(2, 4):
        for _ in range(2):
            loss_of(model).backward()
            logits(model)
        optimizer.step()
        model.state_dict()
        assert launches == [layers] * step, "of all layers together"
    edit(model)
    logits(model)
    assert launches == [layers] * 4


READERS = {
    "named_parameters": lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
    "state_dict": lambda m: m.state_dict(),
    "a_copy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickled(m).state_dict(),
}


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("reader", READERS)
def test_nobody_reads_a_stale_adapter_after_a_step(constrained, reader):
    model, bases = constrained
    loss_of(model).backward()
    torch.optim.AdamW(trained(model), lr=0.1).step()
    tensors = READERS[reader](model)
    for name, basis in bases.items():
        a_RK = tensors[f"base_model.model.{name}.lora_A.default.weight"]
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()


CHANGES = {
    "by_hand": edit,
    "data": lambda m: [setattr(a_of(x), "data", torch.ones_like(a_of(x))) for _, x in layers_of(m)],
    "load_state_dict": lambda m: m.load_state_dict(other(m)),
    "assigned": lambda m: m.load_state_dict(other(m), assign=True),
    "set_peft_model_state_dict": lambda m: peft.set_peft_model_state_dict(
        m, {k.replace(".default", ""): v for k, v in other(m).items() if "lora_" in k}
    ),
    "dtype": lambda m: m.double().float(),
}


def other(model):
    return {k: torch.ones_like(v) if "lora_A" in k else v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", ["forward", "merge", "state_dict"])
def test_whatever_changes_a_it_is_projected_before_it_is_used(constrained, change, reader):
    model, bases = constrained
    CHANGES[change](model)
    if reader == "forward":
        loss_of(model).backward()
        for name, layer in layers_of(model):
            grad = a_of(layer).grad
            assert grad.any(), "the new A is trained"
            assert (grad @ bases[name]).norm() < LEAST * grad.norm()
    if reader == "merge":
        before = {n: layer.base_layer.weight.clone() for n, layer in layers_of(model)}
        model.merge_adapter()
        for name, layer in layers_of(model):
            delta = layer.base_layer.weight - before[name]
            assert delta.norm() > 0.01
            assert (delta @ bases[name]).norm() < 1e-5 * before[name].norm()
    if reader == "state_dict":
        model.state_dict()
    assert_confined(model, bases)


def test_an_optimizer_that_pytorch_does_not_see_writing(constrained):
    """As DeepSpeed does: it steps copies of its own, and then writes A through .data."""
    model, bases = constrained
    own = [p.detach().clone().requires_grad_() for p in trained(model)]
    optimizer = torch.optim.SGD(own, lr=1.0)
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, new in zip(trained(model), own, strict=True):
        parameter.data.copy_(new)
    logits(model)
    assert_confined(model, bases)


def test_zero_3_is_refused(constrained):
    """It saves its own parts of A, as the optimizer left them."""
    model, _ = constrained
    for parameter in model.parameters():
        parameter.ds_id = 0
    with pytest.raises(RuntimeError, match=r"constrain_peft: DeepSpeed ZeRO-3 .*FSDP2"):
        logits(model)


def test_an_edit_that_pytorch_does_not_count(llama):
    model = adapted(llama, targets=["q_proj"])
    bases = make_bases(model)
    constraint = nk.constrain_peft(model, bases)
    for _, layer in layers_of(model):
        a_of(layer).data.add_(1)
    constraint.project()
    assert_confined(model, bases)


def test_inference_mode_leaves_it_fit_for_training(constrained):
    model, bases = constrained
    edit(model)
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=2)
    assert_confined(model, bases)
    loss_of(model).backward()
    torch.optim.SGD(trained(model), lr=0.1).step()
    assert_confined(model, bases)


def test_graphs_outlive_the_step_of_another_optimizer(constrained):
    model, _ = constrained
    other_model = nn.Linear(2, 2)
    first = loss_of(model)
    other_model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other_model.parameters(), lr=0.1).step()
    (first + loss_of(model)).backward()


def test_exports_what_nsru_linear_exports(llama, tmp_path):
    wrapped, swapped, bases = twins(llama)
    for model in (wrapped, swapped):
        loss_of(model).backward()
        torch.optim.AdamW(trained(model), lr=1e-2).step()
    wrapped.save_pretrained(tmp_path / "peft")
    nk.save_lora_adapter(swapped, tmp_path / "nsru")
    tensors, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "nsru"))
    assert tensors.keys() == expected.keys(), "plain LoRA"
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(by_peft), logits(wrapped))
    assert_confined(by_peft, bases)
    loaded = copy.deepcopy(llama)
    nk.load_lora_adapter(loaded, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), logits(wrapped), rtol=1e-4, atol=1e-5)
    before = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-5)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


def test_retain_inputs_are_answered_as_before(constrained):
    model, bases = constrained
    for name, layer in layers_of(model):
        x = torch.randn(5, 6) @ bases[name].T
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-5, atol=1e-5)


def test_disabled_and_several_adapters(llama, constrained):
    model, bases = constrained
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=3))
    assert logits(model).isfinite().all()
    model.set_adapter("second")
    loss_of(model).backward()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with pytest.raises(RuntimeError, match=r"lora_A.second.weight would be trained outside"):
        optimizer.step()
    nk.constrain_peft(model, bases, adapters="second")
    optimizer.step()
    used = {name: basis for name, basis in bases.items() if name.endswith("q_proj")}
    for name, layer in layers_of(model):
        if name in used:
            a_RK = a_of(layer, "second")
            assert (a_RK @ used[name]).norm() < LEAST * a_RK.norm()
    model.base_model.set_adapter(["default", "second"])
    loss_of(model).backward()
    assert_confined(model, bases)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    for name, layer in layers_of(model):
        if name in used:
            assert (a_of(layer, "both") @ used[name]).norm() < 1e-5
    model.delete_adapter("second")
    model.set_adapter("default")
    logits(model)


def test_what_is_unfrozen_later_is_refused(constrained):
    model, _ = constrained
    head = model.get_base_model().lm_head.weight.requires_grad_(True)
    loss_of(model).backward()
    before = head.detach().clone()
    with pytest.raises(RuntimeError, match=r"lm_head.weight would be trained outside"):
        torch.optim.SGD(trained(model), lr=0.1).step()
    assert torch.equal(head, before)


def test_what_was_merged_and_unloaded_trains_as_it_likes(constrained):
    model, _ = constrained
    plain = model.merge_and_unload().requires_grad_(True)
    loss_of(plain).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()


@pytest.mark.parametrize("way", ["remove", "with"])
def test_undone_by_one_call(llama, way):
    model = adapted(llama, targets=["q_proj"])
    bases = make_bases(model)
    gc.collect()  # models of other tests
    hooks = (
        optimizer_module._global_optimizer_pre_hooks,
        optimizer_module._global_optimizer_post_hooks,
    )
    found = [*map(len, hooks)]
    plain = {name: type(module) for name, module in model.named_modules()}
    constraint = nk.constrain_peft(model, bases)
    with constraint if way == "with" else nullcontext():
        assert {type(m) for m in model.modules()} - {*plain.values()} == {constrain.NullSpaceA}
        before = logits(model)
    for _ in range(2):
        constraint.remove()
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert torch.equal(logits(model), before)
    loss_of(model).backward()
    torch.optim.AdamW(trained(model), lr=0.1).step()
    assert min(leakages(model, bases).values()) > 0.1
    assert [*map(len, hooks)] == found
    nk.constrain_peft(model, bases)
    assert_confined(model, bases)


def test_nothing_keeps_a_model_alive(llama):
    model = adapted(llama, targets=["q_proj"])
    constraint = nk.constrain_peft(model, make_bases(model))
    loss_of(model).backward()
    layer = weakref.ref(layers_of(model)[0][1])
    del model
    gc.collect()
    assert layer() is None
    constraint.remove()


def test_a_copy_is_constrained_too(constrained):
    model, bases = constrained
    for twin in (copy.deepcopy(model), pickled(model)):
        loss_of(twin).backward()
        torch.optim.SGD(trained(twin), lr=0.1).step()
        grads = [a_of(layer).grad @ bases[name] for name, layer in layers_of(twin)]
        assert max(grad.norm() for grad in grads) < LEAST
        logits(twin)
        assert_confined(twin, bases)
    assert all(parameter.grad is None for parameter in trained(model))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(llama, fullgraph):
    wrapped, _, bases = twins(llama, targets=["q_proj", "down_proj"])
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=fullgraph)
    optimizer = torch.optim.SGD(trained(wrapped), lr=0.5)
    for _ in range(2):
        loss_of(compiled).backward()
        grads = [p.grad.clone() for p in trained(wrapped)]
        wrapped.zero_grad()
        loss_of(wrapped).backward()
        for grad, parameter in zip(grads, trained(wrapped), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        wrapped.zero_grad()
        edit(wrapped)
        torch.testing.assert_close(logits(compiled), logits(wrapped), rtol=1e-4, atol=1e-5)
    assert_confined(wrapped, bases)


def test_models_that_peft_was_put_into(llama):
    """As transformers' own add_adapter does, with no PeftModel around."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(llama))
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    bases = {n: torch.linalg.qr(torch.randn(m.in_features, 5)).Q for n, m in layers}
    nk.constrain_peft(model, bases)
    loss_of(model).backward()
    torch.optim.SGD(trained(model), lr=0.1).step()
    for name, layer in layers:
        assert (a_of(layer) @ bases[name]).norm() < LEAST * a_of(layer).norm()


@pytest.mark.parametrize("wrap", ["compile", "ddp"])
def test_wrapped_models(llama, wrap):
    model = adapted(llama, targets=["q_proj"])
    bases = make_bases(model)
    if wrap == "compile":
        nk.constrain_peft(torch.compile(model, backend="eager"), bases)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            nk.constrain_peft(nn.parallel.DistributedDataParallel(model), bases)
        finally:
            dist.destroy_process_group()
    assert_confined(model, bases)


def train_on_rank(rank, rendezvous, folder, kind):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, bases = parallel_case()
    wrapped = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        mine = ids[rank : rank + 1]
        wrapped(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
    tensors = peft.get_peft_model_state_dict(model)
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}
    if rank == 0:
        torch.save((whole, bases), folder + "/result.pt")
    dist.destroy_process_group()


def parallel_case():
    model = adapted(tiny_llama().eval(), targets=["q_proj", "down_proj"])
    bases = make_bases(model)
    nk.constrain_peft(model, bases)
    return model, bases


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(tmp_path, kind):
    mp.spawn(train_on_rank, (f"{tmp_path}/rendezvous", str(tmp_path), kind), nprocs=2)
    tensors, bases = torch.load(tmp_path / "result.pt")
    model, _ = parallel_case()
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for key, expected in peft.get_peft_model_state_dict(model).items():
        torch.testing.assert_close(tensors[key], expected, rtol=1e-4, atol=1e-6)
    for name, basis in bases.items():
        a_RK = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()


def test_trainer_saves_and_resumes(llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def train(steps, **options):
        model = adapted(llama, targets=["q_proj", "down_proj"])
        bases = make_bases(model)
        nk.constrain_peft(model, bases)
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2,
            lr_scheduler_type="constant", save_steps=2, use_cpu=True, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train(**options)
        assert_confined(model, bases)
        return model, bases

    _, bases = train(2)
    file = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    for name, basis in bases.items():
        a_RK = file[f"base_model.model.{name}.lora_A.weight"]
        assert (a_RK @ basis).norm() < LEAST * a_RK.norm()
    resumed, _ = train(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    straight, _ = train(4)
    for parameter, expected in zip(trained(resumed), trained(straight), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def test_plain_tensors_for_weights_are_refused(constrained):
    model, _ = constrained
    linear = layers_of(model)[0][1].lora_A["default"]
    a_RK = linear.weight
    del linear.weight
    with pytest.raises(RuntimeError, match="Use fully_shard or DistributedDataParallel"):
        linear.weight = a_RK.data


def refused(model, bases, match, error=ValueError, **options):
    before = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        nk.constrain_peft(model, bases, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, r"q_proj: adapter 'default' is a DoraLinearVariant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which moves part of W"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which moves part of W"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.modules_to_save.default.weight is trained to"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"embed_tokens: .* is in a Embedding layer"),
        ({"trainable_token_indices": [1, 2]}, r"embed_tokens\S* is trained too"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_is_more_than_lora_is_refused(llama, options, match):
    model = adapted(llama, **{"targets": ["q_proj"], **options})
    bases = {name: torch.eye(32, 4) for name, _ in layers_of(model)}
    refused(model, bases, match)


def test_an_adapter_in_the_place_of_a_deleted_one_is_refused(llama):
    model = adapted(llama, targets=["q_proj"])
    constraint = nk.constrain_peft(model, make_bases(model))
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="would be trained outside of the null space"):
        optimizer.step()
    constraint.remove()
    optimizer.step()


def test_a_head_that_is_saved_too_is_named_as_the_cause(llama):
    """Its copy changes the fingerprint of the weights as well."""
    subspaces = nk.estimate_retain_subspaces(
        llama, [{"input_ids": ids}], "q_proj", width=8, rank=2, progress=False
    )
    model = adapted(llama, targets=["q_proj"], modules_to_save=["lm_head"])
    refused(model, subspaces, r"lm_head\S* is trained too, outside of the null space")


def test_trained_biases_are_refused():
    model = tiny_llama(attention_bias=True).eval()
    for options in ({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}):
        wrapped = adapted(model, targets=["q_proj"], **options)
        refused(wrapped, make_bases(wrapped), r"bias is trained too, outside of the null space")


def test_experts_in_parameters_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return torch.einsum("mk,enk->men", x, self.up_proj)

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.up_proj"])
    model = peft.get_peft_model(nn.Sequential(Experts()), config)
    refused(model, {"0": torch.eye(8, 2)}, "is in a ParamWrapper layer; only LoRA on a linear")


def test_wrong_subspaces_are_refused(llama):
    model = adapted(llama, targets=["q_proj", "k_proj"])
    bases = make_bases(model)
    name = next(iter(bases))
    short = {key: basis for key, basis in bases.items() if key != name}
    refused(model, short, f"no entry for 1 of 4 LoRA layers, the first '{name}'")
    prefixed = {f"base_model.model.{key}": basis for key, basis in bases.items()}
    refused(model, prefixed, "no entry for 4 of 4 LoRA layers")
    refused(
        model, {**bases, name: torch.eye(16, 2)}, r"basis must be a floating \[K=32, Q\] matrix"
    )
    refused(model, {**bases, name: "U"}, "expected a RetainSubspace or a tensor", TypeError)
    refused(model, [*bases.values()], "subspaces must map names of modules", TypeError)
    if not torch.cuda.is_available():
        refused(model, bases, "cuda", nk.BackendUnavailable, backend="cuda")
    refused(model, bases, "adapters has 'other'; the model's adapters are", adapters="other")
    model.merge_adapter()
    refused(model, bases, "is merged; call unmerge_adapter")
    model.unmerge_adapter()
    with nk.constrain_peft(model, bases), pytest.raises(ValueError, match="constrained already"):
        nk.constrain_peft(model, bases)
    for plain in (llama, nn.Linear(2, 2)):
        refused(plain, bases, "no LoRA layer of PEFT; make them with get_peft_model")
    swapped = copy.deepcopy(llama)
    nk.swap_linears(swapped, ALL, rank=2, alpha=2)
    refused(swapped, bases, "no LoRA layer of PEFT")


def test_estimated_subspaces_know_the_model_inside_peft(llama):
    found = nk.estimate_retain_subspaces(llama, [{"input_ids": ids}], ["q_proj"], width=8, rank=4)
    model = adapted(llama, targets=["q_proj"])
    constraint = nk.constrain_peft(model, found)
    assert constraint.retain_ranks == {name: 4 for name, _ in layers_of(model)}
    assert_confined(model, {name: subspace.basis for name, subspace in found.items()})
    stranger = adapted(tiny_llama(hidden_act="gelu"), targets=["q_proj"])
    with torch.no_grad():
        stranger.get_base_model().lm_head.weight.add_(1)
    refused(stranger, found, "fingerprint")
