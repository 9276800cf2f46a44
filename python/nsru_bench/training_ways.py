"""Models shaped like Llama, batches, and the ways to train them that ``step.py`` compares."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import peft
import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import nsru_kernels as nk
from nsru_bench.cases import normal_numbers
from nsru_kernels.nn.swap import replace_module
from nsru_kernels.ops.linear import few
from nsru_train.data.encode import Encoded
from nsru_train.losses.batch import FORGET, RETAIN, SAFE
from nsru_train.losses.nll import answer_nll
from nsru_train.methods import Objective
from nsru_train.trainer import unlearning_loss
from nsru_train.unlearn_dataset import Row, RowCollator

RECORDED = "nsru, products recorded"  # as few tokens on a CPU are; on a GPU for the host's sake
ADAPTED = ("nsru", RECORDED, "peft bf16", "peft + eager projection")  # all with the same update
FULL = "full fine-tuning + reference model"
SCALING = 2.0
OBJECTIVE = Objective()
# Who reads the same input and therefore shares a basis; the others have one each.
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}


class Case(NamedTuple):
    """A model's shape and a step's batch: ``tokens`` in sequences of ``length``."""

    model: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    tokens: int
    length: int
    R: int = 16
    Q: int = 256
    nf4: bool = False


LLAMA_1B = Case("Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128256, True, 8192, 512)
LLAMA_8B = Case("Llama-3-8B", 32, 4096, 32, 8, 14336, 128256, False, 8192, 512)
# Q is the mean rank that the default floor leaves on it.
SMOLLM2 = Case("SmolLM2-135M", 30, 576, 9, 3, 1536, 49152, True, 1152, 96, 8, 464)
SMOLLM2_NF4 = SMOLLM2._replace(model="SmolLM2-135M NF4", Q=256, nf4=True)
TINY = Case("tiny", 2, 64, 4, 2, 96, 128, False, 64, 16, 4, 8)


@dataclass(frozen=True)
class Way:
    """One way to train: a model and what goes with it.

    Attributes:
        model: in training mode.
        optimizer: of what is trained; None for the frozen model.
        prepare: batch → batch, inside the step.
        held: tensors beside the model's own that stay in memory between steps.
        inside: makes the context of every forward.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch
    held: tuple[Tensor, ...] = ()
    inside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with self.inside():
            return unlearning_loss(self.model, self.prepare(batch), OBJECTIVE)[0]

    def step(self, batch: dict[str, Tensor]) -> None:
        self.loss(batch).backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # as the trainer does
            self.optimizer.step()
            self.optimizer.zero_grad()

    def resident_bytes(self) -> int:
        """Bytes that stay between steps: weights, adapters, bases, moments, a second model."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return storage_bytes(
            itertools.chain(self.model.parameters(), self.model.buffers(), moments, self.held)
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind ``tensors``, each storage once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def make_model(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen Llama of this shape with random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.intermediate,
        max_position_embeddings=max(2048, case.length),
        tie_word_embeddings=case.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if case.nf4:
        hold_in_nf4(model)
    return model.requires_grad_(False).train()


def hold_in_nf4(model: nn.Module) -> None:
    """Quantise the linears as QLoRA does; the head stays as it is."""
    from bitsandbytes.nn import Linear4bit

    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.get_output_embeddings():
            sizes, weight = (linear.in_features, linear.out_features), linear.weight
            quantised = Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=weight.dtype)
            quantised.load_state_dict({"weight": weight})
            replace_module(model, name, quantised.to(weight.device))


def make_bases(model: nn.Module, width: int) -> dict[str, Tensor]:
    """Module name → random orthonormal basis [K, Q], one tensor for all that read one input."""
    bases: dict[tuple[str, str], Tensor] = {}
    found = {}
    for name, linear in model.named_modules():
        parent, _, child = name.rpartition(".")
        if not isinstance(linear, nn.Linear) or linear is model.get_output_embeddings():
            continue
        key = (parent, SHARED.get(child, child))
        if key not in bases:
            normal = normal_numbers(linear.weight.device, len(bases))
            bases[key] = torch.linalg.qr(normal(linear.in_features, width))[0].contiguous()
        found[name] = bases[key]
    return found


def make_batches(case: Case, device: torch.device, count: int) -> list[dict[str, Tensor]]:
    """Random tokens as the trainer's collator batches them; the second half is the answer."""
    generator = torch.Generator().manual_seed(0)
    rows = case.tokens // case.length
    kinds = list(itertools.islice(itertools.cycle((SAFE, FORGET, RETAIN, RETAIN)), rows))
    batches = []
    for _ in range(count):
        ids = torch.randint(3, case.vocabulary, (rows, case.length), generator=generator)
        encoded = [Encoded(row, case.length // 2) for row in ids.tolist()]
        items = [[Row(row, kind) for row, kind in zip(encoded, kinds, strict=True)]]
        batches.append({name: value.to(device) for name, value in RowCollator(0)(items).items()})
    return batches


@torch.no_grad()
def answer_sums(model: nn.Module, batch: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Summed answer NLL of the chosen rows of a batch."""
    names = ("input_ids", "attention_mask", "labels")
    nll, index = answer_nll(model, {name: batch[name][rows] for name in names})
    return nll.new_zeros(int(rows.sum())).index_add_(0, index, nll)


def with_reference(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    forget = batch["kind"] == FORGET
    ref_nll = batch["ref_nll"].clone()
    ref_nll[forget] = answer_sums(model, batch, forget)
    return {**batch, "ref_nll": ref_nll}


def shared_copy(model: nn.Module) -> nn.Module:
    """Modules of their own around the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_way(model: nn.Module, **options: Any) -> Way:
    """Train what wants a gradient, and go back to the embedding's output in any case."""
    model.get_input_embeddings().register_forward_hook(lambda _, args, y: y.requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.0, fused=True) if trained else None
    return Way(model, optimizer, **options)


@torch.no_grad()
def make_nsru(case: Case, base: nn.Module, **options: Any) -> Way:
    model, bases = shared_copy(base), make_bases(base, case.Q)
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    nk.swap_linears(
        model, list(bases), rank=case.R, alpha=SCALING * case.R, subspaces=bases,
        batch={"input_ids": ids},
    )  # fmt: skip
    for index, module in enumerate(nsru_modules(model).values()):
        normal = normal_numbers(module.lora_A.device, index)
        # B makes about a tenth of a frozen linear's output.
        for adapter, scale in ((module.lora_A, case.hidden**-0.5), (module.lora_B, 0.02)):
            # Exact in the dtype of the run: all ways start equal.
            adapter.copy_((normal(adapter.shape) * scale).to(module.dtype))
    return make_way(model, **options)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Computes every linear as one of few tokens, whatever their number."""
    with patch.dict(few.MOST, cpu=1 << 40, cuda=1 << 40):
        yield


def nsru_modules(model: nn.Module) -> dict[str, nk.NSRULinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)}


def make_peft(case: Case, base: nn.Module, like: nn.Module, *, projected: bool) -> Way:
    """PEFT with the adapters of ``like``: projected, or projecting the activations in a hook."""
    modules = nsru_modules(like)
    config = peft.LoraConfig(
        r=case.R, lora_alpha=round(SCALING * case.R), target_modules=list(modules), lora_dropout=0.0
    )
    model = peft.get_peft_model(shared_copy(base), config, autocast_adapter_dtype=False).train()
    bases: dict[int, Tensor] = {}
    for name, module in modules.items():
        layer = model.get_base_model().get_submodule(name)
        lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
        a_RK = module.lora_A
        if projected:
            basis = bases.setdefault(id(module.basis), module.basis.to(module.dtype))
            lora_a.register_forward_pre_hook(projection(basis))
        else:
            a_RK = nk.project_adapter(a_RK, module.basis)
        with torch.no_grad():
            lora_a.weight.copy_(a_RK)
            lora_b.weight.copy_(module.lora_B)
    return make_way(model, held=tuple(bases.values()))


def projection(basis: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def project(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        return (x - (x @ basis) @ basis.T,)

    return project


def make_full(base: nn.Module) -> Way:
    """Every weight trained; the base model itself is the copy that serves as reference."""
    model = copy.deepcopy(base).requires_grad_(True)
    held = tuple(base.parameters())
    return make_way(model, prepare=lambda batch: with_reference(base, batch), held=held)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def has_room_for_full(base: nn.Module) -> bool:
    """True where weights, gradients and both moments of a trained copy fit; says so if not."""
    needed = 4 * storage_bytes(base.parameters())
    free = free_bytes(next(base.parameters()).device)
    if needed > free:
        sizes = f"weights, gradients and moments take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB"
        print(f"{FULL} is not timed: {sizes} are free", flush=True)
    return needed <= free


def make_ways(case: Case, base: nn.Module, names: Iterable[str] | None = None) -> dict[str, Way]:
    """Name → way; of ``names`` only, if given."""
    nsru = make_nsru(case, base)
    makers: dict[str, Callable[[], Way]] = {
        "frozen": lambda: make_way(shared_copy(base)),
        "nsru": lambda: nsru,
        RECORDED: lambda: make_nsru(case, base, inside=recorded),
        "peft bf16": lambda: make_peft(case, base, nsru.model, projected=False),
        "peft + eager projection": lambda: make_peft(case, base, nsru.model, projected=True),
        FULL: lambda: make_full(base),
    }
    wanted = list(makers if names is None else names)
    if FULL in wanted and (case.nf4 or not has_room_for_full(base)):
        wanted.remove(FULL)
    return {name: makers[name]() for name in wanted}


def make_all(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Way]]:
    """The frozen model, two batches and the ways, with the reference NLL in the batches."""
    base = make_model(case, device, dtype)
    batches = [with_reference(base, batch) for batch in make_batches(case, device, count=2)]
    return base, batches, make_ways(case, base)
