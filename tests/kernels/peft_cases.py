"""A model with PEFT's LoRA, constrained, and the same one swapped."""

import copy

import peft
import torch
from linear_cases import make_basis, tiny_llama
from torch import nn

import nsru_kernels as nk

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ids = torch.arange(24).reshape(2, 12)


def adapted(model, *, targets=ALL, rank=4, alpha=8, autocast_adapter_dtype=True, **options):
    """A copy of model with PEFT's LoRA in it, whose B is not zero."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options)
    torch.manual_seed(1)
    result = peft.get_peft_model(
        copy.deepcopy(model), config, autocast_adapter_dtype=autocast_adapter_dtype
    )
    for name, parameter in result.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return result


def swapped_like(model, wrapped, bases, adapter="default"):
    """A copy of model with the adapters of wrapped, of their dtype, in ``NSRULinear``s."""
    result, layers = copy.deepcopy(model), dict(layers_of(wrapped))
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    alphas = {name: layer.scaling[adapter] * ranks[name] for name, layer in layers.items()}
    nk.swap_linears(
        result, list(layers), rank=1, alpha=1, rank_pattern=ranks, alpha_pattern=alphas,
        subspaces=bases,
    )  # fmt: skip
    for name, layer in layers.items():
        module = result.get_submodule(name)
        module.lora_A = nn.Parameter(a_of(layer, adapter).detach().clone())
        module.lora_B = nn.Parameter(layer.lora_B[adapter].weight.detach().clone())
    return result


def twins(model=None, q=6, **options):
    """(constrained, swapped, bases), their adapters alike."""
    model = tiny_llama().double() if model is None else model
    wrapped = adapted(model, **options)
    bases = make_bases(wrapped, q)
    swapped = swapped_like(model, wrapped, bases)
    nk.constrain_peft(wrapped, bases)
    return wrapped, swapped, bases


def make_bases(wrapped, q=6):
    """Name of each layer → U [K, Q]; in float64 where the model is."""
    dtype = torch.promote_types(wrapped.dtype, torch.float32)
    return {name: make_basis(layer.in_features, q).to(dtype) for name, layer in layers_of(wrapped)}


def layers_of(wrapped):
    """(name in the plain model, PEFT's layer)."""
    modules = wrapped.get_base_model().named_modules()
    return [(name, m) for name, m in modules if isinstance(m, peft.tuners.lora.LoraLayer)]


def a_of(layer, adapter="default"):
    """A as it is stored: nothing is projected by this."""
    return layer.lora_A[adapter]._parameters["weight"]


def leakages(wrapped, bases, adapter="default"):
    """‖A U‖/‖A‖ of each layer, of A as it is stored."""
    result = {}
    for name, layer in layers_of(wrapped):
        a_RK = a_of(layer, adapter).detach().double()
        result[name] = float((a_RK @ bases[name].double()).norm() / a_RK.norm())
    return result


def loss_of(model):
    return model(input_ids=ids, labels=ids).loss


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
