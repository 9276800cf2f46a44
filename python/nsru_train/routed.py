"""Experts over one shared A: which of them serves is decided by each prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_kernels.files import atomic_write_all, check_fields, read_json, read_tensors
from nsru_kernels.hf.peft_format import check_fingerprint
from nsru_kernels.nn.inputs import evaluating
from nsru_kernels.nn.sharded import on_first_rank, whole
from nsru_kernels.nn.swap import replace_module
from nsru_train.cached import Turn, decision_at, keep_decision, token_mask
from nsru_train.data.encode import Encoded, collate, encode_prompt, length_batches, pad_token_id
from nsru_train.losses.hidden import decoder_layers, layer_states
from nsru_train.quantized import refuse_wrapped

WEIGHTS, CONFIG = "routed_adapter.safetensors", "routed_adapter.json"
_FIELDS = {"schema": int, "layer": int, "domains": list[str], "alpha": dict[str, float]}
_ROUTER = "prompt_router"  # the model's child


class Router(nn.Module):
    """Sends each prompt to the retain expert, 0, or to that of one domain, 1 … D.

    A linear classifier of the mean over the prompt's tokens of the frozen model's states after one
    decoder layer, which costs a forward pass up to there before each prompt. The KV cache keeps the
    choice that was made at its prompt, for the tokens that are decoded one by one; several tokens
    on top of one (prefill_chunk_size, a cache of earlier turns, an assistant_model) are refused.

    Args:
        weight: [1 + D, H].
        bias: [1 + D].
        layer: from 0.
        domains: names of 1 … D.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, layer: int, domains: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.layer, self.domains = layer, list(domains)
        self.chosen_BD: Tensor | None = None  # ω of the last batch; zeros: the retain expert alone
        self._turn = Turn()

    def attach(self, model: Any) -> None:
        """Choose at every forward of ``model``; `answer_states` then says where prompts end.

        Raises:
            ValueError: its forward does not call its base_model.
        """
        model.add_module(_ROUTER, self)
        model.reads_prompt = True
        model.base_model.register_forward_pre_hook(self._listen, with_kwargs=True)
        model.base_model.register_forward_hook(self._keep, with_kwargs=True)
        model.base_model.register_forward_hook(self._end, always_call=True)
        with evaluating(model):
            model(torch.zeros(1, 1, dtype=torch.int64, device=self.weight.device))

    def choose(self, states_BH: Tensor) -> Tensor:
        """The expert of each prompt, [B], by the mean state of its tokens."""
        return F.linear(states_BH.float(), self.weight.float(), self.bias.float()).argmax(1)

    def omega(self, input: Tensor) -> Tensor:
        """ω [B, D] for a linear's input [B, S, K].

        Raises:
            ValueError: its rows are not those of the last batch.
        """
        chosen = self.chosen_BD
        if chosen is None or input.dim() != 3 or len(input) != len(chosen):
            rows = "no batch" if chosen is None else f"{len(chosen)} prompts"
            raise ValueError(
                f"routed experts need inputs [B, S, K] of the batch that the model was called with "
                f"({rows}), got {tuple(input.shape)}. Exclude layers that regroup tokens; models "
                "whose forward does not call their base_model, such as OPT, are not supported."
            )
        return chosen.to(input)

    def _listen(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        self._turn.take()
        known, prompt = kwargs.pop("domain", None), kwargs.pop("prompt_mask", None)
        if _serves(backbone):
            if kwargs.get("state"):
                raise ValueError(
                    "state: a list of states, as RWKV's, cannot keep which expert serves; generate "
                    "with use_cache=False."
                )
            inputs = kwargs | ({"input_ids": args[0]} if args else {})
            tokens = inputs["input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"]
            kept = decision_at(kwargs, tokens) if known is None else None
            if known is None and kept is None:
                known = self.choose(mean_states(backbone, inputs, self.layer, prompt)) - 1
            if kept is None:
                domains = torch.arange(len(self.domains), device=known.device)
                kept = (known.unsqueeze(1) == domains).float()
            self.chosen_BD = kept
        return args, kwargs

    def _keep(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if _serves(backbone):
            assert self.chosen_BD is not None
            keep_decision(kwargs, output, self.chosen_BD)

    def _end(self, *_: Any) -> None:
        self._turn.pass_on()


def _serves(backbone: nn.Module) -> bool:
    routed = next((m for m in backbone.modules() if isinstance(m, RoutedLinear)), None)
    return routed is not None and routed.enabled


class RoutedLinear(nk.NSRULinear):
    """y = x Wᵀ + b + s · dropout(x) Āᵀ (B_0 + Σ_d ω_d B_d)ᵀ, ω by the router, for each row.

    ``lora_A`` [R, K] is shared and ``lora_B`` [N, (1 + D) R] holds B_0 … B_D side by side. B_0 gets
    gradient from rows without a domain only, and B_d from those of d. In plain PyTorch operations.
    """

    def open_experts(self, router: Router, lora_b: Tensor) -> None:
        """Take ``lora_b`` [N, (1 + D) R] and be told by ``router`` which of its parts serve."""
        self.lora_B = nn.Parameter(lora_b)
        self._router = (router,)  # in a tuple it is no child

    def forward(self, input: Tensor) -> Tensor:
        y_BSN = F.linear(input, self.weight, self.bias)
        if not self.enabled:
            return y_BSN
        omega_BD = self._router[0].omega(input)
        a_RK = nk.project_adapter(self.lora_A, self.basis, backend=self.backend).to(input.dtype)
        b_NR, b_NE = self.lora_B.to(input.dtype).tensor_split([self.rank], dim=1)
        s_BSR = F.linear(F.dropout(input, self.dropout, self.training), a_RK)
        s_BSE = (omega_BD[:, None, :, None] * s_BSR.unsqueeze(2)).flatten(2)
        forgotten_B11 = omega_BD.any(1)[:, None, None]
        kept_BSN = torch.where(forgotten_B11, F.linear(s_BSR, b_NR.detach()), F.linear(s_BSR, b_NR))
        return y_BSN + self.scaling * (kept_BSN + F.linear(s_BSE, b_NE))

    def delta_weight(self) -> Tensor:
        raise ValueError(
            "its experts are chosen by each prompt, so there is no one weight to merge; "
            "nsru_train.adapters.load_adapter serves such an adapter."
        )


def add_experts(model: nn.Module, router: Router, std: float) -> int:
    """Let every `NSRULinear` of ``model`` be a `RoutedLinear`; returns the number of parameters.

    Args:
        std: of the normal distribution that all B start from.
    """
    refuse_wrapped(model, "alter")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)}
    for name, old in modules.items():
        new = _routed(old, old.rank, old.alpha, basis=old.subspace, dropout=old.dropout)
        shape = old.out_features, len(router.bias) * old.rank
        new.open_experts(router, std * torch.randn(shape, device=old.lora_B.device))
        replace_module(model, name, new)
    router.attach(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _routed(linear: Any, rank: int, alpha: float, **options: Any) -> RoutedLinear:
    found = RoutedLinear.from_linear(linear, rank, alpha=alpha, **options)
    assert isinstance(found, RoutedLinear)
    return found


def fit_router(
    model: nn.Module,
    tokenizer: Any,
    retain: Sequence[str],
    domains: Mapping[str, Sequence[str]],
    layer: int,
) -> tuple[Router, int]:
    """A router by logistic regression, and how many of the questions it sends to their own expert.

    The questions of each expert together weigh as much as those of another.

    Args:
        retain: questions of the retain expert.
        domains: those of each other expert.
    """
    prompts = [retain, *domains.values()]
    encoded = [Encoded(encode_prompt(tokenizer, text), 0) for some in prompts for text in some]
    sizes = torch.tensor([len(some) for some in prompts])
    device = next(model.parameters()).device
    rows: dict[int, Tensor] = {}
    for ids in length_batches(encoded):
        batch = collate([encoded[i] for i in ids], pad_token_id(tokenizer, model))
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        rows |= zip(ids, mean_states(model, inputs, layer).double().cpu(), strict=True)
    states_PH = torch.stack([rows[i] for i in range(len(encoded))])
    labels_P = torch.arange(len(prompts)).repeat_interleave(sizes)
    mean_H, scale_H = states_PH.mean(0), states_PH.std(0).clamp(min=1e-6)
    weight_EH = torch.zeros(len(prompts), states_PH.shape[1], dtype=torch.float64)
    bias_E = weight_EH[:, 0].clone()
    trained = [weight_EH.requires_grad_(), bias_E.requires_grad_()]
    optimizer = torch.optim.LBFGS(trained, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_PE = F.linear((states_PH - mean_H) / scale_H, weight_EH, bias_E)
        found = F.cross_entropy(logits_PE, labels_P, weight=1 / sizes.double())
        found = found + 1e-2 * weight_EH.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    plain_EH = (weight_EH / scale_H).detach()
    plain_E = bias_E.detach() - plain_EH @ mean_H
    router = Router(plain_EH.float(), plain_E.float(), layer, list(domains))
    right = int((router.choose(states_PH) == labels_P).sum())
    return router.to(device), right


def mean_states(
    model: nn.Module, inputs: Mapping[str, Any], layer: int, prompt: Tensor | None = None
) -> Tensor:
    """Mean [B, H] over tokens of the frozen model's states after decoder layer ``layer``.

    Args:
        inputs: of the model; those that say more than its tokens and their places are not used.
        prompt: [B, S], True where a token belongs to a prompt; None: everywhere.
    """
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    inputs = {k: inputs[k] for k in names if inputs.get(k) is not None}
    tokens = next(inputs[name] for name in names[:2] if name in inputs)
    seen_BS = token_mask(inputs.get("attention_mask"), tokens)
    with evaluating(model), nk.adapters_disabled(model):
        states_BSH = layer_states(model, inputs, layer)
    seen_BS = seen_BS if prompt is None else seen_BS & prompt
    sums_BH = torch.where(seen_BS.unsqueeze(2), states_BSH.float(), 0).sum(1)
    return sums_BH / seen_BS.sum(1, keepdim=True).clamp(min=1)


def save_routed(model: nn.Module, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write A, projected, all B and the router into ``folder``, for `load_routed`.

    Raises:
        ValueError: one holds NaN or infinite values; nothing was written.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    router = model.get_submodule(_ROUTER)
    assert isinstance(router, Router)
    tensors = {"router.weight": router.weight, "router.bias": router.bias}
    for name, module in modules.items():
        tensors |= {f"{name}.lora_A": module.projected_adapter(), f"{name}.lora_B": module.lora_B}
    tensors = {n: whole(t).detach().float().cpu().contiguous() for n, t in tensors.items()}
    config = {
        "schema": 1,
        "layer": router.layer,
        "domains": router.domains,
        "alpha": {name: module.alpha for name, module in modules.items()},
        "leakage": {name: module.leakage() for name, module in modules.items()},
        **metadata,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    with on_first_rank(model) as first:
        if first:
            _check_finite(tensors, "training diverged. Nothing was written.")
            atomic_write_all({folder / WEIGHTS: save(tensors), folder / CONFIG: text})


def load_routed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Serve the experts that `save_routed` wrote: the base model is changed in place.

    Raises:
        ValueError: a file is missing or damaged, holds NaN or infinite values, or belongs to
            another base model, which is then as it was.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG)
    check_fields(folder / CONFIG, config, _FIELDS)
    if config["schema"] != 1:
        raise ValueError(
            f"adapter: {folder / CONFIG}: schema must be 1, got {config['schema']}: it was written "
            "by another version."
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"adapter: {folder} has no {WEIGHTS}; copy it again, or train again.")
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        check_fingerprint(model, folder / CONFIG)
        modules = _fill(model, config, tensors)
    except ValueError as error:
        raise ValueError(f"adapter: {folder}: {error}") from error
    model.requires_grad_(False)
    for name, module in modules.items():
        replace_module(model, name, module)
    next(iter(modules.values()))._router[0].attach(model)


def _fill(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, RoutedLinear]:
    experts, names = 1 + len(config["domains"]), list(config["alpha"])
    layers = len(decoder_layers(model)[1])
    if not names or not 0 <= config["layer"] < layers:
        raise ValueError(
            f"expected adapted linears and a layer from 0 to {layers - 1}, got {len(names)} and "
            f"{config['layer']}."
        )
    config_of_model: Any = model.config
    hidden = config_of_model.get_text_config().hidden_size
    shapes: dict[str, tuple[int, ...]]
    shapes = {"router.weight": (experts, hidden), "router.bias": (experts,)}
    linears = dict(model.named_modules())
    for name in names:
        linear = linears.get(name)
        if type(linear) is not nn.Linear:
            raise ValueError(f"the model has no plain linear {name!r}; another base?")
        rank = next(iter(tensors.get(f"{name}.lora_A", torch.empty(0)).shape), 0)
        shapes[f"{name}.lora_A"] = rank, linear.in_features
        shapes[f"{name}.lora_B"] = linear.out_features, experts * rank
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(found.items() ^ shapes.items()):
        raise ValueError(f"expected tensors of other names or shapes, check {odd[0]}.")
    _check_finite(tensors, "the file is damaged. Copy it again, or train again.")
    router = Router(
        tensors["router.weight"], tensors["router.bias"], config["layer"], config["domains"]
    )
    made = {}
    for name in names:
        lora_a, lora_b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        made[name] = module = _routed(linears[name], len(lora_a), config["alpha"][name])
        module.open_experts(router.to(module.weight.device), lora_b.to(module.weight.device))
        with torch.no_grad():
            module.lora_A.copy_(lora_a)
    return made


def _check_finite(tensors: Mapping[str, Tensor], remedy: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values: {remedy}")
