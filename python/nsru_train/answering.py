"""Answers of a model: greedy or sampled continuations of prompts, in batches."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import Encoded, encode_prompt, encode_qa, pad_token_id
from nsru_train.language_models import (
    check_sequences,
    decoder_inputs,
    end_tokens,
    is_encoder_decoder,
    position_limit,
)
from nsru_train.losses.nll import cache_name, keeps_cache
from nsru_train.shares import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 200,
    max_tokens: int = 4096,
    opening: str = "",
    sample: bool = False,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answer to each question, special tokens and outer white space removed.

    Left padding and a KV cache. Sampling settings and penalties of the model's own generation
    config are not used; its EOS tokens are, and the token with which a turn ends. Equal questions
    are answered once. Questions are batched as far as it makes no difference: those of one length
    where a model sees padding in spite of the attention mask, as BART does by its positions; none
    where it mixes up their states, as RWKV does in transformers.

    Args:
        model: with or without adapters or guard.
        tokenizer: of the model.
        questions: raw texts; the chat template is put around them.
        max_new_tokens: longest answer.
        max_tokens: most tokens of a batch, padding and max_new_tokens included, which bounds the
            KV cache; a single longer sequence still gets its own batch.
        opening: first words of every answer, put into the model's mouth and not returned.
        sample: draw tokens from the model's distribution instead of the likeliest ones; equal
            questions share one draw.
        progress: show a progress bar.

    Returns:
        One answer for each question, in their order.

    Raises:
        TypeError: questions is one text.
        ValueError: a question leaves no room for an answer in the model's position table.
    """
    if isinstance(questions, str):
        raise TypeError(
            f"greedy_answers: questions must be a list of texts, got {questions!r:.60}."
        )
    questions = list(questions)  # read twice
    texts = answer_share(
        Shares(), model, tokenizer, questions, max_new_tokens=max_new_tokens,
        max_tokens=max_tokens, opening=opening, sample=sample, progress=progress,
    )  # fmt: skip
    return [texts[question] for question in questions]


def answer_share(
    shares: Shares,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 200,
    max_tokens: int = 4096,
    opening: str = "",
    sample: bool = False,
    progress: bool = False,
) -> dict[str, str]:
    """Question -> answer of those in this process's batches, each as one process has it.

    Args, Raises: as in `greedy_answers`.
    """
    if not questions:
        return {}
    model = _causal(model)
    apart = is_encoder_decoder(model)
    prompts = {
        question: _opened(tokenizer, question, "" if apart else opening) for question in questions
    }
    shortest = min(prompts, key=lambda question: len(prompts[question]))
    answers = continuations(
        shares,
        model,
        tokenizer,
        prompts,
        stop=_stop_tokens(model, tokenizer, shortest),
        begun=_decoder_start(model, tokenizer, opening) if apart else None,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        sample=sample,
        progress=progress,
    )
    return {
        question: tokenizer.decode(ids, skip_special_tokens=True).strip()
        for question, ids in answers.items()
    }


def _causal(model: PreTrainedModel) -> PreTrainedModel:
    # PEFT's adapters live in the base model's modules.
    return getattr(model, "get_base_model", lambda: model)()


def continuations(
    shares: Shares,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[int]],
    *,
    stop: Collection[int],
    begun: Tensor | None = None,
    max_new_tokens: int,
    max_tokens: int = 4096,
    sample: bool = False,
    progress: bool = False,
) -> dict[str, list[int]]:
    """The tokens that follow each prompt's, up to the first that is in ``stop``, left out.

    Of the prompts in this process's batches. ``begun`` [1, n] begins what an encoder-decoder
    writes. Other arguments and errors are those of `greedy_answers`.
    """
    model = _causal(model)
    order = sorted(prompts, key=lambda name: -len(prompts[name]))
    check_sequences(model, [Encoded([*prompt, 0], 0) for prompt in prompts.values()])
    limit = position_limit(model) or float("inf")
    pad = pad_token_id(tokenizer, model)
    found: dict[str, list[int]] = {}
    with evaluating(model):
        one = len(prompts) == 1
        together = "none" if one else _answered_together(model, prompts[order[-1]], pad, begun)
        batches = shares.of(_prompt_batches(prompts, order, max_tokens, max_new_tokens, together))
        longest = [int(min(max_new_tokens, limit - len(prompts[batch[0]]))) for batch in batches]
        # All answers of a batch grow together, so its tokens tell how far it is, not its answers.
        with tqdm(
            total=sum(longest), desc="answering", unit="token", disable=not progress, leave=False
        ) as bar:
            for batch, new_tokens in zip(batches, longest, strict=True):
                end = bar.n + new_tokens
                width = len(prompts[batch[0]])
                inputs = _left_padded([prompts[name] for name in batch], pad, width, begun)
                inputs = {k: v.to(model.device) for k, v in inputs.items()}
                for row, ids in _generate(model, inputs, new_tokens, stop, pad, sample, bar):
                    found[batch[row]] = ids
                bar.update(end - bar.n)  # tokens that no answer came to
    return found


def _prompt_batches(
    prompts: Mapping[str, Sequence[int]],
    order: Sequence[str],
    max_tokens: int,
    max_new_tokens: int,
    together: str,
) -> list[Sequence[str]]:
    """Prompts of falling length in batches of at most max_tokens, new ones included; which ones
    may stand together is said by `_answered_together`."""
    batches = []
    while order:
        width = len(prompts[order[0]])
        rows = max(1, max_tokens // (width + max_new_tokens))
        if together == "none":
            rows = 1
        elif together == "one length":
            rows = min(rows, sum(len(prompts[name]) == width for name in order))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def _generate(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    new_tokens: int,
    stop: Collection[int],
    pad: int,
    sample: bool,
    bar: Any,
) -> Iterator[tuple[int, list[int]]]:
    """(row, its tokens up to the one that stops it), as rows end; ``bar`` counts new tokens.

    Where the model allows it, those that have ended leave the batch and its KV cache, some at a
    time: few answers are as long as the longest.
    """
    from transformers import StoppingCriteriaList

    # An encoder-decoder gives what its decoder began with, and the new tokens.
    width = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    rows = torch.arange(len(inputs["input_ids"]))
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=model.device)
    leave = len(rows) > 1 and keeps_cache(model)
    cache: dict[str, Any] = {}
    left = new_tokens
    while len(rows):
        criteria = StoppingCriteriaList([_Counter(bar), *([_SomeEnded(stops)] if leave else [])])
        with generation_config(model, left, sorted(stop), pad, do_sample=sample):
            output = model.generate(
                **inputs, **cache, stopping_criteria=criteria, return_dict_in_generate=True
            )
        ids = output.sequences
        ended = torch.isin(ids[:, width:], stops).any(1).cpu()
        left = new_tokens - (ids.shape[1] - width)
        if not leave or left <= 0:
            ended[:] = True
        for row in ended.nonzero().squeeze(1).tolist():
            tokens = ids[row, width:].tolist()
            end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
            yield int(rows[row]), tokens[:end]
        rows, kept = rows[~ended], (~ended).nonzero().squeeze(1).to(ids.device)
        if len(rows):
            mask = inputs["attention_mask"]
            mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            inputs = {"input_ids": ids[kept], "attention_mask": mask[kept]}
            cache = {cache_name(): output[cache_name()]}
            cache[cache_name()].batch_select_indices(kept)


class _Counter:
    """Moves a progress bar on by one for every new token, and ends nothing."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._bar.update()
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)


class _SomeEnded:
    """Ends a generation as soon as an eighth of its rows, or one, have reached a stop token."""

    def __init__(self, stops: Tensor) -> None:
        self._stops = stops
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = torch.isin(input_ids[:, -1], self._stops)
        self._ended = last if self._ended is None else self._ended | last
        enough = self._ended.sum() >= max(1, len(input_ids) // 8)
        return enough.expand(len(input_ids))


def _opened(tokenizer: PreTrainedTokenizerBase, question: str, opening: str) -> list[int]:
    """Tokens of a prompt and of the first words of its answer."""
    if not opening:
        return encode_prompt(tokenizer, question)
    encoded = encode_qa(tokenizer, question, opening, max_length=1 << 30)
    return encoded.input_ids[: len(encoded) - encoded.closing]


def _decoder_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: str
) -> Tensor:
    """The beginning of an encoder-decoder's answers, [1, N]: its start token, and their opening."""
    words = encode_qa(tokenizer, "?", opening, max_length=1 << 30).answer if opening else []
    labels = torch.tensor([[*words, tokenizer.eos_token_id]])
    return decoder_inputs(model, labels)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, width: int, begun: Tensor | None
) -> dict[str, Tensor]:
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    answers = {} if begun is None else {"decoder_input_ids": begun.repeat(len(prompts), 1)}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **answers}


def _stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str
) -> set[int]:
    """EOS, and what ends a turn in the chat template."""
    turn_end = encode_qa(tokenizer, question, "yes", max_length=1 << 30).input_ids[-1]
    return {tokenizer.eos_token_id, turn_end, *end_tokens(model)}


_batching: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _answered_together(
    model: PreTrainedModel, prompt: Sequence[int], pad: int, begun: Tensor | None
) -> str:
    """The prompts that may stand in one batch: those of "any length", "one length", or "none".

    By what makes no difference to a prompt's answer: padding, whatever tokens it holds, and
    another prompt beside it. Some models mix up the states of several.
    """
    if model in _batching:
        return _batching[model]

    def generated(**inputs: Tensor) -> Tensor:
        """Logits of the first two tokens after the first prompt, [2, V]."""
        with generation_config(model, 2, None, pad):
            output = model.generate(
                **{name: value.to(model.device) for name, value in inputs.items()},
                return_dict_in_generate=True,
                output_logits=True,
            )
        return torch.stack([logits[0] for logits in output.logits]).float()

    whole = _left_padded([prompt], pad, len(prompt), begun)
    alone = generated(**whole)

    def alike(logits: Tensor) -> bool:
        # Equal but for rounding, by which experts get other numbers of tokens and 16 bits move
        # single logits by a tenth. Where the first token is another one, so is what follows.
        if not torch.equal(logits[0].argmax(), alone[0].argmax()):
            logits = logits[:1]
        finite = alone[: len(logits)].isfinite()
        wanted = alone[: len(logits)][finite]
        off = (logits[finite] - wanted).abs() / wanted.std()
        if model.dtype == torch.float32:
            return bool((off <= 1e-2).all())
        return bool(off.square().mean() <= 0.1**2)

    other = next((token for token in prompt if token != pad), prompt[0])
    padded = []
    for token in (pad, other):
        inputs = _left_padded([prompt], pad, 8 + len(prompt), begun)
        inputs["input_ids"][0, :8] = token
        padded.append(alike(generated(**inputs)))
    beside = generated(**_left_padded([prompt, prompt[::-1]], pad, len(prompt), begun))
    name, found = type(model).__name__, "any length"
    if not alike(beside):
        found = "none"
        logger.warning(
            "%s mixes up the states of several prompts in a batch: questions are answered one by "
            "one, which takes longer.", name,
        )  # fmt: skip
    elif not all(padded):
        found = "one length"
        logger.warning(
            "%s sees padding in spite of the attention mask: only questions of one length "
            "are answered together, which takes longer.",
            name,
        )
    del whole["attention_mask"]
    inputs = {name: value.to(model.device) for name, value in whole.items()}
    if not alike(type(model).forward(model, **inputs).logits[:, -1].float()):
        logger.warning(
            "%s generates otherwise than it is scored and trained, by other positions for "
            "example: its greedy answers, and ROUGE, are not those of the model in training.",
            name,
        )
    return _batching.setdefault(model, found)


@contextmanager
def generation_config(
    model: PreTrainedModel,
    max_new_tokens: int,
    stop: list[int] | None,
    pad: int,
    *,
    do_sample: bool = False,
) -> Iterator[None]:
    """Greedy, or plain sampling, in place of what the model's own generation config says."""
    # Replaced, not passed to generate(): what is passed inherits penalties and sampling settings.
    from transformers import GenerationConfig

    own = model.generation_config
    start = getattr(own, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        top_k=0 if do_sample else None,
        use_cache=True,
        eos_token_id=stop,
        decoder_start_token_id=start,
        pad_token_id=pad,
    )
    _forget_positions(model)
    try:
        yield
    finally:
        model.generation_config = own
        _forget_positions(model)


def _forget_positions(model: nn.Module) -> None:
    """Drop what models of the kind of Qwen2-VL keep for the rows of the batch before."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None  # type: ignore[assignment]
