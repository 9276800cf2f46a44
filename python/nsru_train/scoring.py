"""Forward passes of evaluation, batched by length: teacher-forced scores and greedy answers."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import (
    Encoded,
    collate,
    encode_prompt,
    encode_qa,
    length_batches,
    pad_token_id,
)
from nsru_train.language_models import decoder_inputs, is_encoder_decoder
from nsru_train.losses.nll import (
    AnswerHidden,
    AnswerLogits,
    answer_states,
    cache_name,
    keeps_cache,
    reads_prompts_once,
    shared_states,
)
from nsru_train.shares import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_POSITION_TABLE = re.compile(
    r"(?:^|\.)(?:wpe|embed_positions|positions_embed|position_embeddings|pos_encoding)$"
)
_NOT_ASKED = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """One sequence's answer, token by token; last comes what ends the turn, such as EOS."""

    nll: np.ndarray  # [n] float64, nats
    predictions: np.ndarray  # [n] argmax of the teacher-forced logits; [0] where not asked for

    @property
    def loss(self) -> float:
        """Mean NLL per token."""
        return float(self.nll.mean())

    @property
    def probability(self) -> float:
        """exp(-loss): TOFU's probability of an answer."""
        return float(np.exp(-self.nll.mean()))


def position_limit(model: nn.Module) -> int | None:
    """Rows of a position table; None for a model without one, such as most rotary ones."""
    for name, buffer in model.named_buffers():
        if buffer.dim() == 2 and _POSITION_TABLE.search(name):  # GPT-J, CodeGen, CTRL
            return len(buffer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa
            return module.num_embeddings - getattr(module, "offset", reserved)  # OPT's offset
    return None


def check_positions(model: nn.Module, encoded: Sequence[Encoded]) -> None:
    """Raise ValueError where a sequence is longer than the model's position table.

    Without a table, one beyond the positions that its config states is said once.
    """
    longest, limit = max(map(len, encoded), default=0), position_limit(model)
    stated, kind = _stated_positions(model), type(model).__name__
    if limit is None and stated is not None and longest > stated and (kind, stated) not in _warned:
        _warned.add((kind, stated))
        logger.warning(
            "a text has %d tokens, %s is made for %d positions (max_position_embeddings): it may "
            "not understand what lies beyond them. Shorten such texts, or set max_length to %d.",
            *(longest, kind, stated, stated),
        )
    if limit is not None and longest > limit:
        raise ValueError(
            f"a text has {longest} tokens, {type(model).__name__} has {limit} positions; shorten "
            "it, or set max_length to leave it out"
        )


_warned: set[tuple[str, int]] = set()  # copies of a model, as `nsru compare` makes, are one


def _stated_positions(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    stated = getattr(config, "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def score_sequences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    predict: Sequence[bool] | None = None,
    max_tokens: int = 4096,
    progress: bool = False,
) -> list[Score]:
    """Token NLLs of each answer, and its argmax predictions where asked for; one forward each.

    The head sees answer positions only. A prompt that several answers follow, as TOFU's wrong ones
    do, is read once where the model's state is a KV cache. The model is put in eval mode and left
    as it was.

    Args:
        encoded: sequences, in any order.
        predict: for each sequence, whether `predictions` is wanted; None for none of them.
        max_tokens: most tokens of a batch, padding included; a single longer sequence gets its own.

    Raises:
        ValueError: a sequence is longer than the model's position table, or its NLL is not finite.
    """
    found = score_share(
        Shares(), model, tokenizer, encoded, predict=predict, max_tokens=max_tokens,
        progress=progress,
    )  # fmt: skip
    return [found[i] for i in range(len(encoded))]


def score_share(
    shares: Shares,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    predict: Sequence[bool] | None = None,
    max_tokens: int = 4096,
    progress: bool = False,
) -> dict[int, Score]:
    """Index -> score of the sequences in this process's batches, each as one process has it.

    Args, Raises: as in `score_sequences`.
    """
    check_positions(model, encoded)
    predict = [False] * len(encoded) if predict is None else predict
    scores: dict[int, Score] = {}
    batches = shares.of(_batches(model, encoded, max_tokens))
    with (
        evaluating(model),
        _bar(sum(len(indices) for _, indices in batches), "scoring", progress) as bar,
    ):
        for apart, indices in batches:
            items = [encoded[i] for i in indices]
            states = (_apart if apart else _together)(model, items, pad_token_id(tokenizer, model))
            ends = np.cumsum([len(item) - item.answer_start for item in items])[:-1]
            nll = np.split(states.nll().double().cpu().numpy(), ends)
            tokens = [_NOT_ASKED] * len(items)
            if any(predict[i] for i in indices):
                tokens = np.split(states.predictions().cpu().numpy(), ends)
            for i, values, chosen in zip(indices, nll, tokens, strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"NLL of sequence {i} is {values.mean()}: the model's weights hold NaN or "
                        "infinite values, or overflow in its dtype. Did training diverge?"
                    )
                scores[i] = Score(values, chosen if predict[i] else _NOT_ASKED)
            bar.update(len(indices))
    return scores


# Answers from which on a prompt is read apart from them: fewer save less than smaller batches cost.
_MANY = 3


def _batches(
    model: nn.Module, encoded: Sequence[Encoded], max_tokens: int
) -> list[tuple[bool, list[int]]]:
    """(whether prompts are read apart from the answers, indices) of every batch."""
    plain = length_batches(encoded, max_tokens)
    answers: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(encoded):
        answers.setdefault(tuple(item.input_ids[: item.answer_start]), []).append(i)
    many = [indices for indices in answers.values() if len(indices) >= _MANY]
    if not many or not reads_prompts_once(model, encoded[many[0][0]].input_ids):
        return [(False, indices) for indices in plain]
    shared = list(_shared_batches(encoded, many, max_tokens))
    rest = sorted(set(range(len(encoded))).difference(*shared))
    again = length_batches([encoded[i] for i in rest], max_tokens)
    return [
        *((True, indices) for indices in shared),
        *((False, [rest[i] for i in indices]) for indices in again),
    ]


def _shared_batches(
    encoded: Sequence[Encoded], many: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Batches of the answers to prompts with many, of one length and long answers first."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for indices in many:
        by_length.setdefault(encoded[indices[0]].answer_start, []).append(indices)
    for _, groups in sorted(by_length.items(), reverse=True):
        batch: list[int] = []
        width = 0
        for indices in sorted(groups, key=lambda found: -max(len(encoded[i]) for i in found)):
            for i in indices:
                wider = max(width, len(encoded[i]))
                if batch and (len(batch) + 1) * wider > max_tokens:
                    yield batch
                    batch, wider = [], len(encoded[i])
                batch.append(i)
                width = wider
        yield batch


def _together(model: nn.Module, items: Sequence[Encoded], pad: int) -> AnswerHidden | AnswerLogits:
    batch = collate(items, pad)
    return answer_states(model, {k: v.to(_device(model)) for k, v in batch.items()})


def _apart(model: nn.Module, items: Sequence[Encoded], pad: int) -> AnswerHidden:
    device, start = _device(model), items[0].answer_start
    texts = [tuple(item.input_ids[:start]) for item in items]
    prompts = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    answers = [torch.tensor(item.input_ids[start:]) for item in items]
    return shared_states(
        model,
        torch.tensor(list(prompts), device=device),
        torch.tensor([prompts[text] for text in texts], device=device),
        nn.utils.rnn.pad_sequence(answers, True, pad).to(device),
        torch.tensor([len(answer) for answer in answers], device=device),
    )


@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    max_tokens: int = ...,
    progress: bool = ...,
) -> float: ...
@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Sequence[Encoded]],
    *,
    max_tokens: int = ...,
    progress: bool = ...,
) -> dict[str, float]: ...
def quick_probabilities(model, tokenizer, encoded, *, max_tokens=4096, progress=False):
    """Mean over sequences of p = exp(-mean token NLL), EOS included.

    Cheap enough for every point of a training curve: encode once, outside. Several named sets go
    through one pass.

    Args:
        encoded: sequences, or name -> sequences.
        max_tokens: most tokens of a batch, padding included.
        progress: show a progress bar.

    Returns:
        The mean, or name -> mean.

    Raises:
        ValueError: a set is empty, or as in `score_sequences`.
    """
    sets = encoded if isinstance(encoded, Mapping) else {"encoded": encoded}
    for name, items in sets.items():
        if not items:
            raise ValueError(f"quick_probabilities: {name} is empty; give at least one sequence.")
    flat = [item for items in sets.values() for item in items]
    scores = iter(score_sequences(model, tokenizer, flat, max_tokens=max_tokens, progress=progress))
    means = {
        name: float(np.mean([next(scores).probability for _ in items]))
        for name, items in sets.items()
    }
    return means if isinstance(encoded, Mapping) else means["encoded"]


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether the logits of a token change by more than rounding with a token behind it.

    False where the model does not run on four tokens alone."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(4, device=next(model.parameters()).device)[None] % rows
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    try:
        first, second = model(input_ids=torch.cat([ids, other])).logits[:, :-1].float()
    except Exception:  # a model can need more than that
        return False
    exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    change = (first - second).abs().max() / first.std().clamp_min(1e-30)
    return bool(change > (1e-3 if exact else 0.1))


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
        sample: draw tokens from the model's distribution instead of the likeliest ones.
        progress: show a progress bar.

    Returns:
        One answer for each question, in their order.

    Raises:
        ValueError: a question leaves no room for an answer in the model's position table.
    """
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
    check_positions(model, [Encoded([*prompts[order[0]], 0], 0)])
    limit = position_limit(model) or float("inf")
    pad = pad_token_id(tokenizer, model)
    found: dict[str, list[int]] = {}
    with evaluating(model):
        one = len(prompts) == 1
        together = "none" if one else _answered_together(model, prompts[order[-1]], pad, begun)
        batches = shares.of(_prompt_batches(prompts, order, max_tokens, max_new_tokens, together))
        longest = [int(min(max_new_tokens, limit - len(prompts[batch[0]]))) for batch in batches]
        # All answers of a batch grow together, so its tokens tell how far it is, not its answers.
        with _bar(sum(longest), "answering", progress, "token") as bar:
            for batch, new_tokens in zip(batches, longest, strict=True):
                end = bar.n + new_tokens
                width = len(prompts[batch[0]])
                inputs = _left_padded([prompts[name] for name in batch], pad, width, begun)
                inputs = {k: v.to(_device(model)) for k, v in inputs.items()}
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
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=_device(model))
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
    """What an encoder-decoder's answers begin with, [1, N]: its start token, and their opening."""
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


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The EOS tokens of the model's generation config."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, Iterable) else [eos]) - {None}


_batching: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _answered_together(
    model: PreTrainedModel, prompt: Sequence[int], pad: int, begun: Tensor | None
) -> str:
    """Which prompts may stand in one batch: those of "any length", "one length", or "none".

    By what makes no difference to a prompt's answer: padding, whatever tokens it holds, and
    another prompt beside it. Some models mix up the states of several.
    """
    if model in _batching:
        return _batching[model]

    def generated(**inputs: Tensor) -> Tensor:
        """Logits of the first two tokens after the first prompt, [2, V]."""
        with generation_config(model, 2, None, pad):
            output = model.generate(
                **{name: value.to(_device(model)) for name, value in inputs.items()},
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
    inputs = {name: value.to(_device(model)) for name, value in whole.items()}
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


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _bar(total: int, label: str, enabled: bool, unit: str = "seq"):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not enabled, leave=False)
