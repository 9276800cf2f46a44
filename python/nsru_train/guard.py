"""A guard of a served model: flagged prompts get corrupted embeddings, or an adapter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsru_kernels.checks import check_settings
from nsru_kernels.files import check_fields, read_json, read_tensors, whole_folder
from nsru_kernels.hf import peft_format
from nsru_kernels.nn.linear import adapters_disabled
from nsru_kernels.nn.swap import replace_module
from nsru_kernels.subspaces.collection import dtype_hint, fingerprint_weights
from nsru_train.cached import Turn, decision_at, keep_decision, token_mask
from nsru_train.data.encode import find_question
from nsru_train.prompt_classifier import PromptClassifier, load_encoder

CONFIG, WEIGHT = "config.json", "classifier.safetensors"
_OPTIONS = {
    "corruption": ("rand_noise", "zero_out", "flip_sign", None),
    "select": ("first", "top"),
}
_OWN: dict[str, Any] = {
    "corruption": str | None,
    "sigma": float,
    "dims": int | None,
    "select": str,
    "corrupt_answers": bool,
    "seed": int,
    "fingerprint": str | None,
}
_CLASSIFIER: dict[str, Any] = {
    "bias": float,
    "threshold": float,
    "layer": int | None,
    "held_out": dict[str, int],
}


@dataclass
class EcoGuard:
    """Finds prompts that ask for what was to be forgotten, and spoils what the model reads of them.

    Of a flagged prompt all embeddings but the last token's are corrupted, or its row goes through
    an adapter, or both. All other rows are computed as without the guard, bit by bit. Noise depends
    on seed and question alone: a question is answered alike in every batch. Prompts are read in one
    piece, as `encode_prompt` writes them, and any other text as a whole; padding is known by an
    attention_mask [B, S]. A single token is decoding, where nothing is corrupted; several on top of
    a KV cache (prefill_chunk_size, a cache of earlier turns, an assistant_model) are refused.

    Args:
        classifier: flags prompts.
        corruption: "rand_noise" adds N(0, sigma²), "zero_out" zeroes, "flip_sign" negates, None
            changes nothing.
        sigma: standard deviation of the noise.
        dims: entries of an embedding that are changed; None is all.
        select: the "first" entries, or the "top" ones by absolute value.
        corrupt_answers: where a prompt comes with its answer to be scored, also the answer's
            embeddings but the last, as public code has it.
        seed: of the noise.
        adapter: folder of a LoRA adapter for flagged rows.
        fingerprint: of the weights that it is made for; None is not checked.

    Examples:
        >>> guard = EcoGuard.load("runs/eco/adapter")  # doctest: +SKIP
        >>> ids = tokenizer("Question: Who is Ann?", return_tensors="pt")  # doctest: +SKIP
        >>> with guard.attach(model, tokenizer):  # doctest: +SKIP
        ...     answer = model.generate(**ids, max_new_tokens=20)
        >>> print(tokenizer.decode(answer[0]))  # doctest: +SKIP
    """

    classifier: PromptClassifier
    corruption: str | None = "rand_noise"
    sigma: float = 0.1
    dims: int | None = None
    select: str = "first"
    corrupt_answers: bool = False
    seed: int = 0
    adapter: Path | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        ranges = {"sigma": "must not be negative", "dims": "must be ≥ 1"}
        check_settings("guard", self, seed="must be from 0 to 2³² - 1", **ranges)
        for name, options in _OPTIONS.items():
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"guard.{name} must be one of {options}, got {value!r}.")

    def corrupt(self, embeddings_TD: Tensor, question: str) -> Tensor:
        """Embeddings of a prompt's tokens, corrupted."""
        first = self.select == "first"
        order_TD = torch.zeros_like(embeddings_TD) if first else embeddings_TD.abs()
        chosen_TC = order_TD.argsort(dim=1, descending=True, stable=True)[:, : self.dims]
        old_TC = embeddings_TD.gather(1, chosen_TC)
        new_TC = torch.zeros_like(old_TC) if self.corruption == "zero_out" else -old_TC
        if self.corruption == "rand_noise":
            state = zlib.crc32(question.encode(errors="replace"), self.seed)
            generator = torch.Generator().manual_seed(state)
            noise_TC = torch.randn(
                old_TC.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            new_TC = old_TC + (self.sigma * noise_TC).to(old_TC)
        return embeddings_TD.scatter(1, chosen_TC, new_TC)

    def attach(self, model: nn.Module, tokenizer: Any) -> AttachedGuard:
        """Guard the model, until `remove` of what comes back or the end of its ``with`` block.

        Raises:
            ValueError: the guard is made for another model, or the model has one already.
        """
        return AttachedGuard(self, model, tokenizer)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write config.json, the classifier's weights, its encoder if any, and the adapter if any.

        What was at ``path`` is replaced in one piece.
        """
        from safetensors.torch import save_file

        config = {
            "schema": 1,
            "guard": {name: getattr(self, name) for name in _OWN},
            "classifier": {name: getattr(self.classifier, name) for name in _CLASSIFIER},
        }
        with whole_folder(path) as folder:
            text = json.dumps(config, indent=2, allow_nan=False)
            (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
            save_file({"weight": self.classifier.weight}, folder / WEIGHT)
            for part in self.classifier.encoder or ():
                part.save_pretrained(folder / "encoder")
            if self.adapter is not None:
                (folder / "adapter").mkdir()
                for name in (peft_format.WEIGHTS, peft_format.CONFIG, peft_format.SIDECAR):
                    if (self.adapter / name).is_file():
                        shutil.copy(self.adapter / name, folder / "adapter")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EcoGuard:
        """Read what `save` wrote; nothing outside the folder is read.

        Raises:
            ValueError: a file is missing or damaged, or a value is not what it must be.
        """
        folder, file = Path(path), Path(path, CONFIG)
        if missing := [name for name in (CONFIG, WEIGHT) if not (folder / name).is_file()]:
            raise ValueError(
                f"guard: {folder} has no {missing[0]}; expected a folder that EcoGuard.save wrote."
            )
        config, (tensors, _) = read_json(file), read_tensors(folder / WEIGHT)
        check_fields(file, config, {"schema": int, "guard": dict, "classifier": dict})
        check_fields(file, config["guard"], _OWN)
        check_fields(file, config["classifier"], _CLASSIFIER)
        encoder = load_encoder(folder / "encoder") if (folder / "encoder").is_dir() else None
        adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
        try:
            if config["schema"] != 1:
                raise ValueError(f"schema must be 1, got {config['schema']}")
            weight_D = tensors.get("weight", torch.empty(0))
            classifier = PromptClassifier(weight_D, encoder=encoder, **config["classifier"])
            return cls(classifier, adapter=adapter, **config["guard"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"guard: {folder}: {error}. Was it written by another version, or changed by hand?"
            ) from error


class AttachedGuard:
    """A guard at work on a model; `remove` leaves the model as it was."""

    def __init__(self, guard: EcoGuard, model: nn.Module, tokenizer: Any) -> None:
        self.guard, self.tokenizer, self.model = guard, tokenizer, _causal(model)
        self.enabled = True
        self._known: dict[str, bool] = {}
        self._turn = Turn()
        self._flags: list[bool] = []  # of the rows of the last prompts
        self._spans: list[tuple[int, Tensor, str]] = []  # row, positions, question of flagged ones
        self._linears: dict[str, nn.Module] = {}
        self._off = contextlib.ExitStack()
        if guard_of(model) is not None:
            raise ValueError("guard: the model has one already; remove() it first.")
        found = fingerprint_weights(self.model)
        if guard.fingerprint not in (None, found):
            raise ValueError(
                f"guard: it was made for weights with fingerprint {guard.fingerprint}, the model "
                f"has {found}; load the model that it was made for."
                f"{dtype_hint(self.model, str(guard.fingerprint))}"
            )
        self.flags(["Who?"])  # says what does not fit
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        backbone = _backbone(self.model)
        self._handles = [
            backbone.register_forward_pre_hook(self._read, with_kwargs=True),
            backbone.register_forward_hook(self._keep, with_kwargs=True),
            backbone.register_forward_hook(self._end, always_call=True),
            self.model.get_input_embeddings().register_forward_hook(self._corrupt),
        ]
        try:
            if guard.adapter is not None:
                self._load(guard.adapter)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> AttachedGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the guard and its adapter off the model."""
        for handle in self._handles:
            handle.remove()
        for name, linear in self._linears.items():
            replace_module(self.model, name, linear)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._linears = {}

    def flags(self, questions: Sequence[str]) -> list[bool]:
        """For each raw question, True where it asks for what was to be forgotten."""
        if len(self._known) > 10_000:
            self._known.clear()
        if new := list(set(questions) - self._known.keys()):
            with self.disabled():
                found = self.guard.classifier.log_odds(self.model, self.tokenizer, new)
            flagged = (~(found <= self.guard.classifier.threshold)).tolist()  # NaN too
            self._known.update(zip(new, flagged, strict=True))
        return [self._known[question] for question in questions]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """In the block the model is as it was, adapters off."""
        before, self.enabled = self.enabled, False
        try:
            with adapters_disabled(self.model):
                yield
        finally:
            self.enabled = before

    def _load(self, adapter: Path) -> None:
        before = dict(self.model.named_modules())
        names = peft_format.load_lora_adapter(self.model, adapter).swapped
        self._linears = {name: before[name] for name in names}
        for name in names:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._route))

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
        """Before the backbone runs: which rows are flagged, and where their prompts stand."""
        self._turn.take()
        self._spans = []
        prompt_BS = kwargs.pop("prompt_mask", None)
        if self.enabled:
            self._look(args, kwargs, prompt_BS)
        return args, kwargs

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any], prompt_BS: Any) -> None:
        ids_BS = kwargs.get("input_ids", args[0] if args else None)
        if ids_BS is None:
            raise ValueError("guard: the model got no input_ids, which are read; give them.")
        if (kept := decision_at(kwargs, ids_BS)) is not None:
            self._flags = kept.tolist()
        elif ids_BS.shape[1] > 1 or not kwargs.get("state"):  # of RWKV, which keeps nothing
            self._read_prompts(ids_BS, kwargs.get("attention_mask"), prompt_BS)
        if self._linears and len(self._flags) != len(ids_BS):
            raise ValueError(
                f"guard: {len(ids_BS)} rows are decoded after {len(self._flags)} prompts; decode "
                "the rows that were read, in their order."
            )
        if self._linears and not any(self._flags):
            self._off.enter_context(adapters_disabled(self.model))

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.enabled:
            # On the CPU, where it is read at every token.
            keep_decision(kwargs, output, torch.tensor(self._flags))

    def _end(self, *_: Any) -> None:
        self._off.close()
        self._turn.pass_on()

    def _read_prompts(self, ids_BS: Tensor, attention_mask: Any, prompt_BS: Any) -> None:
        mask_BS = token_mask(attention_mask, ids_BS)
        if prompt_BS is not None and not self.guard.corrupt_answers:
            mask_BS = mask_BS & prompt_BS
        places = [mask_S.nonzero().squeeze(1) for mask_S in mask_BS]
        tokens = [ids_S[place].tolist() for ids_S, place in zip(ids_BS, places, strict=True)]
        found = [find_question(self.tokenizer, ids) for ids in tokens]
        self._flags = self.flags([question for question, _ in found])
        for row, (question, length) in enumerate(found):
            if self._flags[row]:
                length = len(tokens[row]) if self.guard.corrupt_answers else length
                self._spans.append((row, places[row][: max(0, length - 1)], question))

    def _corrupt(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._spans or self.guard.corruption is None:
            return None
        output = output.clone()
        for row, places, question in self._spans:
            output[row, places] = self.guard.corrupt(output[row, places], question)
        return output

    def _route(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """The adapter's output for flagged rows, the frozen linear's for the others."""
        if not (self.enabled and module.enabled) or all(self._flags):
            return None
        if output.dim() < 3 or len(output) != len(self._flags):
            raise ValueError(
                f"guard: a linear reads {tuple(args[0].shape)}, in which rows cannot be told apart;"
                " serve flagged prompts in batches of their own."
            )
        flags = torch.tensor(self._flags, device=output.device)
        plain = F.linear(args[0], module.weight, module.bias)
        return torch.where(flags.view(-1, *[1] * (output.dim() - 1)), output, plain)


@contextlib.contextmanager
def without_update(model: nn.Module) -> Iterator[None]:
    """In the block the model is the base model: adapters and an attached guard are off."""
    attached = guard_of(model)
    with adapters_disabled(model) if attached is None else attached.disabled():
        yield


def _causal(model: nn.Module) -> Any:
    return getattr(model, "get_base_model", lambda: model)()  # PEFT changes it in place


def _backbone(causal: Any) -> nn.Module:
    return getattr(causal, "base_model", causal)


def guard_of(model: nn.Module) -> AttachedGuard | None:
    """The guard at work on ``model``, if any."""
    hooks = _backbone(_causal(model))._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, AttachedGuard)), None)
