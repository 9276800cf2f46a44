"""Models that fully_shard has spread over two ranks train, save and merge as whole ones do."""

import contextlib
import functools
import io
import json
import os

import pytest
import torch
import torch.distributed as dist
from expert_cases import tiny_moe
from linear_cases import tiny_llama
from ranks import Ranks
from safetensors.torch import load_file
from torch import nn

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import CONFIG, SIDECAR, WEIGHTS, copy_lora_adapter
from nsru_kernels.nn.sharded import whole

ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2),
    "sgd": functools.partial(torch.optim.SGD, lr=0.5),
}


@pytest.fixture(scope="module")
def ranks():
    two = Ranks()
    yield two
    two.stop()


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


KINDS = {
    "llama": (tiny_llama, "all-linear"),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc", "c_proj"]),
    "mixtral": (functools.partial(tiny_moe, "mixtral"), ["all-linear", "experts"]),
    "gpt_oss": (functools.partial(tiny_moe, "gpt_oss"), ["all-linear", "experts"]),
}


def layers_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def adapted(kind="llama", **options):
    """A model whose q, k and v are one group, with B beside zero."""
    make, targets = KINDS[kind]
    model = make()
    subspaces = nk.estimate_retain_subspaces(
        model, [{"input_ids": ids + 1 - ids.max() % 2}], targets, rank=5, width=8, progress=False
    )
    torch.manual_seed(3)
    nk.swap_linears(model, targets, rank=4, alpha=8, subspaces=subspaces, **options)
    for module in linears_of(model):
        nn.init.normal_(module.lora_B, std=0.1)
    return model


def linears_of(model):
    return [module for module in model.modules() if isinstance(module, nk.NSRULinear)]


def shard(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(model, rows, optimizer, steps=3):
    """Losses over all ranks, and norms of gradients, of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, logged = OPTIMIZERS[optimizer](trained), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        logged.append((mean_of(loss.detach()), float(whole(norm))))
    return logged


def mean_of(value):
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def rows_of(rank):
    return ids.chunk(2)[rank]


def tensors_in(folder):
    return load_file(folder / WEIGHTS)


def assert_adapters_close(folder, expected, rtol=1e-4, atol=1e-6):
    found, wanted = tensors_in(folder), tensors_in(expected)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=rtol, atol=atol, msg=key)


def train_sharded(rank, folder, kind, optimizer, checkpointing):
    model = adapted(kind)
    if checkpointing is not None:
        use_checkpointing(model, checkpointing)
    shard(model)
    logged = train(model, rows_of(rank), optimizer)
    nk.save_lora_adapter(model, folder / "sharded", metadata={"note": 1})
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert nk.merge_adapters(model) is model
        assert not linears_of(model)
        assert not [name for name, _ in model.named_parameters() if "lora_" in name]
        after = model(input_ids=ids).logits
    assert not [name for name in model.state_dict() if "lora_" in name or "basis" in name]
    weights = {name: p.full_tensor() for name, p in model.state_dict().items()}
    return logged, before, after, weights


def use_checkpointing(model, reentrant):
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize(
    ("kind", "optimizer", "checkpointing"),
    [
        ("llama", "adamw", None),
        ("llama", "sgd", None),
        ("llama", "adamw", False),
        ("llama", "adamw", True),
        ("gpt2", "adamw", None),
        ("mixtral", "adamw", None),
        ("mixtral", "adamw", False),
        ("gpt_oss", "sgd", None),
    ],
)
def test_two_ranks_train_save_and_merge_as_one(ranks, tmp_path, kind, optimizer, checkpointing):
    peft = pytest.importorskip("peft")
    results = ranks.run(train_sharded, tmp_path, kind, optimizer, checkpointing)
    model = adapted(kind)
    wanted = train(model, ids, optimizer)
    nk.save_lora_adapter(model, tmp_path / "whole", metadata={"note": 1})
    assert_adapters_close(tmp_path / "sharded", tmp_path / "whole")
    config, expected = (
        json.loads((tmp_path / name / CONFIG).read_text()) for name in ("sharded", "whole")
    )
    assert config == expected
    sidecar = json.loads((tmp_path / "sharded" / SIDECAR).read_text())
    assert sidecar["note"] == 1
    assert max(sidecar["leakage"].values()) < 1e-5
    by_peft = peft.PeftModel.from_pretrained(KINDS[kind][0](), tmp_path / "sharded").eval()
    with torch.no_grad():
        logits, peft_logits = model.eval()(input_ids=ids).logits, by_peft(input_ids=ids).logits
        merged = nk.merge_adapters(model)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(peft_logits, logits)
    for logged, before, after, weights in results:
        torch.testing.assert_close(torch.tensor(logged), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
        close(before, logits)
        close(after, logits)
        for name, tensor in merged.state_dict().items():
            close(weights[name], tensor)


def copy_into_shards(rank, folder):
    base = shard(tiny_moe("mixtral"))
    with pytest.raises(ValueError, match=r"DTensor: estimate and swap before fully_shard"):
        nk.load_lora_adapter(base, folder)
    with pytest.raises(ValueError, match=r"DTensor: estimate and swap before .*tp_plan"):
        nk.estimate_retain_subspaces(base, [ids], "all-linear", rank=2, width=4)
    model = shard(adapted("mixtral"))
    with torch.no_grad():
        for module in linears_of(model):
            module.lora_B.zero_()
        model(input_ids=ids)
        copy_lora_adapter(model, folder)
        return model(input_ids=ids).logits


def test_an_adapter_is_copied_into_a_sharded_model(ranks, tmp_path):
    model = adapted("mixtral")
    nk.save_lora_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    for logits in ranks.run(copy_into_shards, tmp_path):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def edit_shards(rank):
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    model = shard(adapted())
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # As an allocator does that gives the same memory again.
        patch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
        model(input_ids=ids)
        for module in linears_of(model):
            module.lora_A.mul_(2)
        return model(input_ids=ids).logits


def test_an_edit_of_the_shards_is_seen(ranks):
    model = adapted()
    with torch.no_grad():
        for module in linears_of(model):
            module.lora_A.mul_(2)
        wanted = model(input_ids=ids).logits
    for logits in ranks.run(edit_shards):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def train_by_policy(rank, folder):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    model = shard(adapted(), mp_policy=policy, offload_policy=offload)
    bases = {module.basis.dtype for module in linears_of(model)}
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    logged = train(model, rows_of(rank), "adamw")
    nk.save_lora_adapter(model, folder / "sharded")
    return bases, logits, logged


def test_mixed_precision_and_offloading(ranks, tmp_path):
    results = ranks.run(train_by_policy, tmp_path)
    with torch.no_grad():
        rounded = adapted()
        for parameter in rounded.parameters():  # and no buffer
            parameter.data = parameter.to(torch.bfloat16)
        rounded = rounded(input_ids=ids).logits
    wanted = torch.tensor(train(adapted(), ids, "adamw"))
    for bases, logits, logged in results:
        assert bases == {torch.float32}
        torch.testing.assert_close(logits, rounded)
        torch.testing.assert_close(torch.tensor(logged)[:, 0], wanted[:, 0], rtol=1e-2, atol=0)
    sidecar = json.loads((tmp_path / "sharded" / SIDECAR).read_text())
    assert max(sidecar["leakage"].values()) < 1e-6
    assert {t.dtype for t in tensors_in(tmp_path / "sharded").values()} == {torch.float32}


def shard_root_only(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(adapted())
    with torch.no_grad():
        model(input_ids=ids)  # the root stays gathered
    nk.save_lora_adapter(model, folder / "sharded")
    with torch.no_grad():
        model(input_ids=ids)
        nk.merge_adapters(model)
        return model(input_ids=ids).logits


def test_a_root_that_is_still_gathered_is_saved_and_merged(ranks, tmp_path):
    results = ranks.run(shard_root_only, tmp_path)
    model = adapted()
    nk.save_lora_adapter(model, tmp_path / "whole")
    assert_adapters_close(tmp_path / "sharded", tmp_path / "whole")
    with torch.no_grad():
        for logits in results:
            torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def shard_each_linear(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    for module in linears_of(model):
        fully_shard(module)
    fully_shard(model)
    logged = train(model, rows_of(rank), "sgd")
    nk.save_lora_adapter(model, folder / "sharded")
    with pytest.raises(ValueError, match=r"merge_adapters: .*q_proj was given to fully_shard by"):
        nk.merge_adapters(model)
    return logged


def test_linears_sharded_by_themselves_train_and_save(ranks, tmp_path):
    results = ranks.run(shard_each_linear, tmp_path)
    model = adapted()
    wanted = train(model, ids, "sgd")
    nk.save_lora_adapter(model, tmp_path / "whole")
    assert_adapters_close(tmp_path / "sharded", tmp_path / "whole")
    for logged in results:
        torch.testing.assert_close(torch.tensor(logged), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def fail_to_save_or_merge(rank, folder):
    model = shard(adapted())
    module = linears_of(model)[0]
    with pytest.raises(ValueError, match="merge_adapters"):
        module.merge()
    (folder / "file").touch()
    with pytest.raises(OSError if rank == 0 else RuntimeError):
        nk.save_lora_adapter(model, folder / "file")
    before = {name: p.full_tensor() for name, p in model.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        module.lora_B.fill_(float("nan"))
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match=r"NaN|another rank"):
        nk.save_lora_adapter(model, folder / "new")
    with pytest.raises(ValueError, match=r"merge_adapters: .*NaN"):
        nk.merge_adapters(model)
    after = dict(model.named_parameters())
    return all(torch.equal(after[name].full_tensor(), tensor) for name, tensor in before.items())


def test_a_failure_reaches_all_ranks_and_changes_nothing(ranks, tmp_path):
    assert ranks.run(fail_to_save_or_merge, tmp_path) == [True, True]
    assert not (tmp_path / "new").exists()


def refuse_dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="DTensor: estimate and swap before fully_shard"):
        nk.swap_linears(model, "0", rank=2, alpha=4)
    with pytest.raises(ValueError, match="estimate and swap before"):
        nk.estimate_retain_subspaces(model, [torch.randn(4, 8)], "0", rank=2, width=4)
    model = shard(adapted())
    layer, x = layers_of(model)[0], torch.randn(1, 3, 32)
    for module in (layer.self_attn.q_proj, layer.self_attn.o_proj):  # of a group, by itself
        with pytest.raises(TypeError, match=r"is a DTensor.* tensor parallel.* fully_shard"):
            module(x)


def test_what_is_tensor_parallel_or_not_gathered_is_refused(ranks):
    ranks.run(refuse_dtensors)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x) @ self.read.weight


def estimate_without_batches(rank):
    torch.manual_seed(0)
    model, batches = ReadsWeight(), [torch.randn(20, 8)]
    mine = batches if rank == 0 else []
    subspaces = nk.estimate_retain_subspaces(model, mine, "all-linear", rank=2, width=4)
    nk.swap_linears(model, "all-linear", rank=2, alpha=4, subspaces=subspaces)
    return subspaces.read_elsewhere, [type(m).__name__ for m in model.children()]


def test_a_rank_without_batches_knows_what_is_read_elsewhere(ranks):
    first, second = ranks.run(estimate_without_batches)
    assert first == second
    assert list(first[0]) == ["read"]
    assert first[1] == ["NSRULinear", "Linear"]


def estimate_with_progress(rank):
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        subspaces = nk.estimate_retain_subspaces(
            tiny_llama(), [{"input_ids": rows_of(rank)}], "all-linear", rank=5, width=8
        )
    return shown.getvalue(), {entry.tokens for entry in subspaces.inputs}


def test_an_estimate_of_many_ranks_shows_one_bar(ranks):
    (bar, tokens), (nothing, same) = ranks.run(estimate_with_progress)
    assert "retain activations" in bar
    assert nothing == ""
    assert tokens == same == {ids.numel()}


def train_by_ddp(rank, folder):
    model = adapted()
    logged = train(nn.parallel.DistributedDataParallel(model), rows_of(rank), "adamw")
    if rank == 0:  # alone: nothing is gathered
        nk.save_lora_adapter(model, folder / "ddp")
    return logged


def test_ddp_trains_as_one(ranks, tmp_path):
    results = ranks.run(train_by_ddp, tmp_path)
    model = adapted()
    wanted = train(model, ids, "adamw")
    nk.save_lora_adapter(model, tmp_path / "whole")
    assert_adapters_close(tmp_path / "ddp", tmp_path / "whole")
    for logged in results:
        torch.testing.assert_close(torch.tensor(logged), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def train_by_fsdp1(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = adapted()
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layers_of(model)[0])}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = OPTIMIZERS["sgd"]([p for p in wrapped.parameters() if p.requires_grad])
    losses, rows = [], rows_of(rank)
    for _ in range(3):
        optimizer.zero_grad()
        loss = wrapped(input_ids=rows, labels=rows).loss
        loss.backward()
        wrapped.clip_grad_norm_(0.5)
        optimizer.step()
        losses.append(mean_of(loss.detach()))
    with pytest.raises(ValueError, match=r"save_lora_adapter.*summon_full_params"):
        nk.save_lora_adapter(wrapped, folder / f"refused{rank}")
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        nk.save_lora_adapter(wrapped, folder / f"sharded{rank}")
        with pytest.raises(ValueError, match=r"merge_adapters: .*FSDP1 or ZeRO-3.*`nsru merge`"):
            nk.merge_adapters(wrapped)
    return losses


@pytest.mark.filterwarnings("ignore:.*requires_grad")
def test_fsdp1_trains_and_saves_what_it_gathers(ranks, tmp_path):
    results = ranks.run(train_by_fsdp1, tmp_path)
    model = adapted()
    wanted = [loss for loss, _ in train(model, ids, "sgd")]
    nk.save_lora_adapter(model, tmp_path / "whole")
    for rank, losses in enumerate(results):
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert_adapters_close(tmp_path / f"sharded{rank}", tmp_path / "whole")


def train_by_zero_3(rank, folder, persisting):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    model = adapted()
    sizes = [2, 6] if rank else [8, 3]  # tokens: few ones take another way through a linear
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": 3, "stage3_param_persistence_threshold": persisting
            },
        },
    )  # fmt: skip
    losses, rows = [], rows_of(rank)
    for _ in range(3):
        with torch.no_grad():
            engine(input_ids=rows[:1, : sizes[len(losses) % 2]])
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean_of(loss.detach()))
    if not persisting:
        with pytest.raises(ValueError, match=r"save_lora_adapter.*GatheredParameters"):
            nk.save_lora_adapter(model, folder / f"refused{rank}")
    with deepspeed.zero.GatheredParameters(trained):
        nk.save_lora_adapter(model, folder / f"sharded{rank}")
    return losses


@pytest.mark.parametrize("persisting", [0, 100_000])
def test_deepspeed_zero_3_trains_and_saves_what_it_gathers(ranks, tmp_path, persisting):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    results = ranks.run(train_by_zero_3, tmp_path, persisting)
    model = adapted()
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    wanted = []
    for _ in range(3):
        optimizer.zero_grad()
        wanted.append(model(input_ids=ids, labels=ids).loss)
        wanted[-1].backward()
        optimizer.step()
    nk.save_lora_adapter(model, tmp_path / "whole")
    for rank, losses in enumerate(results):
        assert losses == pytest.approx([float(loss) for loss in wanted], rel=1e-5)
        assert_adapters_close(tmp_path / f"sharded{rank}", tmp_path / "whole")


class GatheredByName(dict):
    """The parameters of a module as ZeRO-3 keeps them: in a forward, reading one gathers it."""

    in_forward = False

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        if self.in_forward and parameter is not None:
            assert parameter.numel(), f"{name} of a module that does not compute is asked for"
        return parameter


class Partitioned:
    """ZeRO-3 of one rank, emulated: parameters are empty but while their module computes."""

    def __init__(self, model):
        self.whole = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.ds_id = len(self.whole)
                    self.whole[parameter] = parameter.data
                    parameter.data = torch.empty(0)
            module._parameters = GatheredByName(module._parameters)
            if module._parameters:
                module.register_forward_pre_hook(lambda module, _: self.gather(module))
                module.register_forward_hook(lambda module, *_: self.release(module))
                module.register_full_backward_pre_hook(lambda module, _: self.gather(module))

    def gather(self, module):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = self.whole[parameter]

    def release(self, module):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = torch.empty(0)


def test_zero_3_trains_as_a_whole_model(monkeypatch, tmp_path):
    plain, model = adapted(), adapted()
    rows = ids.clone()
    loss = plain(input_ids=rows, labels=rows).loss
    loss.backward()
    zero = Partitioned(model)
    with pytest.raises(ValueError, match=r"save_lora_adapter: .* \(0,\).*GatheredParameters"):
        nk.save_lora_adapter(model, tmp_path / "new")
    with pytest.raises(ValueError, match=r"merge_adapters: .*ZeRO-3"):
        nk.merge_adapters(model)
    assert not (tmp_path / "new").exists()
    for _ in range(2):  # also with what is kept of the step before
        model.zero_grad()
        with monkeypatch.context() as forward:
            forward.setattr(GatheredByName, "in_forward", True)
            got = model(input_ids=rows, labels=rows).loss
        got.backward()
        torch.testing.assert_close(got, loss)
        for (name, parameter), own in zip(plain.named_parameters(), zero.whole, strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(own.grad, parameter.grad, msg=name)
        for module in model.modules():
            zero.release(module)
