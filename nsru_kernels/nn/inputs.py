"""Inputs of a model's linear layers: stream batches through it and hand them on."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsru_kernels.checks import check_mask

# Arguments of one forward: by name, in order, or the only one.
Batch = Mapping[str, Any] | Sequence[Any] | Tensor
Batches = Iterable[Batch]
# Takes the input of a linear [..., K] and which of its tokens count [...], None for all.
Consumer = Callable[[Tensor, "Tensor | None"], None]


class ActivationStream:
    """Runs as much of a model as reaches the given linears, and hands what they see to a consumer.

    Args:
        model: any module called with the batch's entries; a transformers model runs without its
            output head when no target needs it, so that there are no logits [B, T, vocab].
        linears: module name → module.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        backbone = getattr(model, "base_model", model)
        inside = set(backbone.modules())
        self.linears = linears
        self.model = model
        called = (getattr(m, "experts", m) for m in linears.values())
        self.module = backbone if all(m in inside for m in called) else model
        self.device = next(itertools.chain(model.parameters(), model.buffers())).device
        takes = inspect.signature(self.module.forward).parameters
        self.extra = {"use_cache": False} if "use_cache" in takes else {}
        self.keep_BT: Tensor | None = None
        self._thread: int | None = None  # that a forward of ours runs in

    def group_by_input(self, batch: Batch) -> list[list[str]]:
        """One forward; module names grouped by the tensor object that they read, in model order."""
        reads = _Reads()
        with _hooks(self.linears, self._of_ours(reads.note)):
            self._forward(batch)
        groups: dict[Any, list[str]] = {}
        for name in self.linears:
            groups.setdefault(reads.of(name) or name, []).append(name)
        return list(groups.values())

    def read_elsewhere(self, batch: Batch) -> dict[str, str]:
        """Linears whose weight another module reads, past any adapter, and the reason by name.

        One forward in eval and one in training mode, two of a token with a cache, and one with a
        loss: fused paths are often taken in one of them.
        """
        reads = _WeightReads(self.linears)
        if not reads.owners:  # on no device, or sharded: nothing can be told
            return {}
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            evaluating(self.module),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),  # or Dynamo keeps what it sees of this
            reads,
        ):
            try:
                self._forward(batch)
            except NotImplementedError as error:
                if "no rule registered" not in str(error):
                    raise
                warnings.warn(
                    "This PyTorch cannot look into higher-order operators such as flex_attention: "
                    "a linear whose weight the model reads instead of calling it is not noticed.",
                    stacklevel=4,
                )
                return {}
            # Some models keep no cache, take no labels, or in training mode want gradients.
            with contextlib.suppress(Exception), reads.instead_of_calls():
                self._decode(batch)
            with contextlib.suppress(Exception), reads.instead_of_calls():
                ids = batch["input_ids"][:1].to(self.device)  # type: ignore
                self.module(input_ids=ids, labels=ids)
            self.module.train()
            with contextlib.suppress(Exception):
                self._forward(batch)
            for buffer, before in buffers:  # running statistics
                buffer.copy_(before)
        return reads.found

    def _decode(self, batch: Any) -> None:
        """The first token of a text, and once more after what was kept of it."""
        token = {"input_ids": batch["input_ids"][:1, :1].to(self.device), "use_cache": True}
        kept = self.module(**token)
        name = next(name for name in ("cache", "past_key_values") if name in kept)
        self.module(**token, **{name: kept[name]})

    def feed(
        self,
        batches: Batches,
        consume: Mapping[str, Consumer],
        label: str | None,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:
        """Run all batches; consume[name](x, kept tokens) on every call of a module.

        Args:
            label: of the progress bar; None for no bar.
            groups: of `group_by_input`, whose first modules are consumed for all in them.

        Raises: ValueError: whatever a consumer refuses, with the module's name in front; modules of
            one group read different tensors in one of the batches.
        """
        reads = _Reads()

        def hand_on(name: str, x: Tensor, tokens: Tensor | None) -> None:
            reads.note(name, x, tokens)
            if name not in consume:
                return
            try:
                consume[name](x, self._kept(x, tokens))
            except ValueError as error:
                raise ValueError(f"input of {name}: {error}") from error

        names = dict.fromkeys([*consume, *itertools.chain.from_iterable(groups)])
        with _hooks({name: self.linears[name] for name in names}, self._of_ours(hand_on)):
            for batch in batches if label is None else with_progress(batches, label):
                reads.clear()
                self._forward(batch)
                for first, *others in groups:
                    if odd := [name for name in others if reads.of(name) != reads.of(first)]:
                        raise ValueError(
                            f"batches: {odd[0]} reads the same tensor as {first} in the first batch"
                            ", and another one in a later batch; begin with such a batch, so that "
                            "each gets a subspace of its own."
                        )

    def _of_ours(self, see: Callable[..., None]) -> Callable[..., None]:
        """``see`` of calls in our forwards alone: batches may be made by the model itself."""

        def called(*args: Any) -> None:
            if threading.get_ident() == self._thread:
                see(*args)

        return called

    def _forward(self, batch: Batch) -> None:
        in_order: Sequence[Any] = ()
        if isinstance(batch, Tensor):
            batch = (batch,)
        _check_no_numbers(batch)
        if isinstance(batch, (tuple, list)):
            in_order, batch = self._by_name(batch)
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must yield dicts, tuples or tensors, the arguments of the model, got "
                f"{type(batch).__name__}."
            )
        _check_tokens(batch)
        ids = batch.get("input_ids")
        if ids is not None and not ids.numel():
            return  # as a loader gives whose last batch has nothing left
        both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if both or batch.get("encoder_hidden_states") is not None:
            _refuse_padding(batch)
        if both:
            batch = self._with_decoder_inputs(batch)
        in_order = [self._moved(value) for value in in_order]
        arguments = {
            name: self._moved(value)
            for name, value in batch.items()
            if name not in ("labels", "token_mask")
        }
        keep_BT = batch.get("token_mask", batch.get("attention_mask"))
        if keep_BT is not None:
            if keep_BT.ndim != 2:
                raise ValueError(
                    f"attention_mask must be [B, T] to tell padding from tokens, got "
                    f"{tuple(keep_BT.shape)}; add a token_mask [B, T] to the batch."
                )
            keep_BT = keep_BT.to(self.device, torch.bool)
        for rows in _told_apart(keep_BT, [*in_order, *arguments.values()]):
            part_BT = None if keep_BT is None else keep_BT[rows]
            self.keep_BT = None if part_BT is None or part_BT.all() else part_BT
            named = {name: _rows(value, rows) for name, value in arguments.items()}
            self._thread = threading.get_ident()
            try:
                self.module(*[_rows(value, rows) for value in in_order], **{**named, **self.extra})
            finally:
                self._thread = None

    def _with_decoder_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with what a decoder reads, made of labels if need be."""
        if batch.get("decoder_input_ids", batch.get("decoder_inputs_embeds")) is not None:
            return batch
        labels = batch.get("labels")
        prepare = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if labels is None or prepare is None:
            raise ValueError(
                "batches: an encoder-decoder needs decoder_input_ids, what its decoder reads, or "
                "labels to make them of."
            )
        if (labels < 0).any():
            raise ValueError(f"batches: labels {_ONE_MASK}")
        return {**batch, "decoder_input_ids": prepare(labels=labels)}

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _by_name(self, values: Sequence[Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Arguments without a name, and the others by theirs, so that masks are known."""
        signature = inspect.signature(self.model.forward)
        try:
            bound = signature.bind_partial(*values)
        except TypeError as error:
            raise TypeError(
                f"batches: {type(self.model).__name__} does not take {len(values)} arguments in "
                f"order ({error}); yield dicts."
            ) from error
        kinds = {signature.parameters[name].kind for name in bound.arguments}
        named = kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        return ((), bound.arguments) if named else (values, {})

    def _kept(self, x: Tensor, tokens: Tensor | None) -> Tensor | None:
        if self.keep_BT is None:
            return None
        if tokens is not None:
            return self.keep_BT.flatten()[tokens].to(x.device)
        if x.shape[:-1] == self.keep_BT.T.shape != self.keep_BT.shape:
            return self.keep_BT.T.to(x.device)  # x is [T, B, K]
        if x.shape[:-1].numel() != self.keep_BT.numel():
            raise ValueError(
                f"tokens {tuple(x.shape[:-1])} do not fit the mask {tuple(self.keep_BT.shape)}, so "
                f"padding cannot be told apart; use batches without padding, or leave this module "
                f"out of the targets."
            )
        return self.keep_BT.reshape(x.shape[:-1]).to(x.device)


def _refuse_padding(batch: Mapping[str, Any]) -> None:
    """Raise ValueError where an encoder's or a decoder's mask leaves tokens out."""
    for name in (
        "attention_mask",
        "token_mask",
        "encoder_attention_mask",
        "decoder_attention_mask",
    ):
        if (mask := batch.get(name)) is not None and not mask.to(torch.bool).all():
            raise ValueError(f"batches: {name} {_ONE_MASK}")


def _told_apart(keep_BT: Tensor | None, values: Sequence[Any]) -> list[slice]:
    """The batch whole; in two parts where it is as long as wide, for a layer may read [T, B, K]."""
    whole = [slice(None)]
    if keep_BT is None or keep_BT.shape[0] != keep_BT.shape[1] or keep_BT.all():
        return whole
    for value in values:
        if isinstance(value, Tensor):
            if value.shape[:1] != keep_BT.shape[:1]:
                return whole
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return whole
    return [slice(1), slice(1, None)]


def _rows(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) and rows != slice(None) else value


def _check_no_numbers(batch: Any) -> None:
    """Raise TypeError where numbers stand in lists or arrays: a model takes tensors."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    if leaves and all(isinstance(leaf, (Number, np.ndarray)) for leaf in leaves):
        kind = type(leaves[0]).__name__
        raise TypeError(
            "batches must yield dicts, tuples or tensors, the arguments of the model, got "
            f"{kind if leaves[0] is batch else f'{kind} in a {type(batch).__name__}'}; {_REMEDY}."
        )


def _check_tokens(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", "attention_mask", "token_mask"):
        value = batch.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"batches: {name} must be a tensor [B, T], got {type(value).__name__}; {_REMEDY}."
            )
    ids = batch.get("input_ids")
    if ids is not None and ids.ndim == 1:
        raise ValueError(
            f"batches: input_ids must be [B, T], got {tuple(ids.shape)}; use ids[None] for one "
            "sequence, and batches=[ids] for one batch."
        )
    mask = batch.get("token_mask")
    if mask is not None and ids is not None and mask.shape != ids.shape:
        raise ValueError(
            f"batches: token_mask must be like input_ids, {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}."
        )
    for name in ("attention_mask", "token_mask"):
        mask = batch.get(name)
        if mask is not None and mask.ndim < 4:  # of four dimensions it is added to attention scores
            check_mask(f"batches: {name}", mask)


_ONE_MASK = (
    "leave tokens out, and one mask cannot tell the padding of encoder and decoder apart; give a "
    "model with both batches without padding."
)
_REMEDY = "make tensors of them by torch.as_tensor, or tokenizer(..., return_tensors='pt')"


class _Reads:
    """The tensors that each module read, call by call: numbers, equal for the same values."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._numbers = itertools.count()
        # Weak: activations must not pile up, and an id may come again once its tensor is gone. With
        # its version: a tensor that was changed in place is another one.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def note(self, name: str, x: Tensor, _: Tensor | None) -> None:
        known, version = self._seen.get(id(x)), 0 if x.is_inference() else x._version
        if known is None or known[0]() is not x or known[1] != version:
            known = self._seen[id(x)] = (weakref.ref(x), version, next(self._numbers))
        self._calls.setdefault(name, []).append(known[2])

    def of(self, name: str) -> tuple[int, ...]:
        return tuple(self._calls.get(name, ()))


class _WeightReads(TorchDispatchMode):
    """Watches for reads of the linears' weights outside of their own forward.

    Below torch functions and by hooks on no module: either would turn the fast path of
    nn.TransformerEncoderLayer off, which is one of those that read weights.
    """

    supports_higher_order_operators = True  # flex_attention, torch.cond

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.linears = linears
        self.owners = {
            pointer: name
            for name, linear in linears.items()
            if (pointer := _address(getattr(linear, "weight", None))) is not None
        }
        self.found: dict[str, str] = {}
        self._called: set[str] = set()
        self._running: list[nn.Module] = []  # in this thread, as the reads that are seen

    def __enter__(self):
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as undo:
            for name, linear in self.linears.items():
                # Also where a model calls forward itself, past all hooks.
                linear.forward = functools.partial(self._forward, name, linear)
                undo.callback(delattr, linear, "forward")
            for handle in (
                register_module_forward_pre_hook(lambda module, _: self._begin(module)),
                register_module_forward_hook(lambda *_: self._end(), always_call=True),
            ):
                undo.callback(handle.remove)
            self._undo = undo.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    @contextlib.contextmanager
    def instead_of_calls(self) -> Iterator[None]:
        """In the block reads count where the linear is not called, too: a loss may look at it."""
        before, self._called = self.found.copy(), set()
        try:
            yield
        finally:
            for name in self._called & (self.found.keys() - before.keys()):
                del self.found[name]

    def _forward(self, name: str, linear: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._called.add(name)
        self._begin(linear)
        try:
            return type(linear).forward(linear, *args, **kwargs)
        finally:
            self._end()

    def _begin(self, module: nn.Module) -> None:
        if threading.get_ident() == self._thread:
            self._running.append(module)

    def _end(self) -> None:
        if threading.get_ident() == self._thread:
            self._running.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            pointer = _address(value)
            if pointer in self.owners and self._running:
                reader = self._running[-1]
                if all(_address(own) != pointer for own in reader._parameters.values()):
                    self.found[self.owners[pointer]] = (
                        f"{type(reader).__name__} reads its weight instead of calling it, so that "
                        "an adapter would have no effect there"
                    )
        return function(*args, **(kwargs or {}))


def _address(value: Any) -> int | None:
    """Where a dense tensor's entries are, which its views and aliases share."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return None
    return value.data_ptr() or None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back, also after an error."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference_mode: a later training step could not use a tensor that a module caches.
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def check_iterable(name: str, batches: Any) -> None:
    """Raise TypeError where there can be no batches in it."""
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"{name} must be a list, a DataLoader or another iterable of batches, got {batches!r}."
        )


def with_first(batches: Batches) -> tuple[Batch | None, Batches]:
    """The first batch (None when there is none), and all batches including it, to be read once."""
    items = iter(batches)
    first = next(items, None)
    return first, batches if first is None else _Sized(batches, itertools.chain([first], items))


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Sized:
    """An iterator with the length of the iterable it came from, for the progress bar."""

    def __init__(self, original: Iterable[Any], items: Iterator[Any]) -> None:
        self.original, self.items = original, items

    def __iter__(self) -> Iterator[Any]:
        return self.items

    def __len__(self) -> int:
        return len(self.original)  # type: ignore[arg-type]


@contextlib.contextmanager
def _hooks(
    linears: Mapping[str, nn.Module], consume: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """While it lasts, consume(name, x, tokens) before each of the linears runs.

    tokens is None where there is a row of x for each; those inside of experts have others.
    """

    def make(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            by_expert = len(args) > 2 and args[2] is True
            x = args[0] if args else next(iter(kwargs.values()))
            consume(name, x, args[1].tokens if by_expert else None)

        return hook

    with contextlib.ExitStack() as handles:
        for name, linear in linears.items():
            handle = linear.register_forward_pre_hook(make(name), with_kwargs=True)
            handles.callback(handle.remove)
        yield


def with_progress(items: Iterable[Any], label: str, unit: str = "batch") -> Iterable[Any]:
    """The items with a bar and the time left, on the first rank, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    quiet = is_distributed() and dist.get_rank() != 0
    return tqdm(items, desc=label, unit=unit, disable=quiet)
