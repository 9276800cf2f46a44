"""Token encoding of question-answer pairs, padding, and batches by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass
class Encoded:
    """input_ids of prompt and answer; the answer with its EOS is input_ids[answer_start:]."""

    input_ids: list[int]
    answer_start: int

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokens that precede an answer: the chat template's, else "Question: …\\nAnswer:"."""
    return _tokens(tokenizer, _render(tokenizer, question))


def encode_qa(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, *, max_length: int = 512
) -> Encoded:
    """Encode prompt + answer + EOS.

    Args:
        tokenizer: its chat_template is used when it has one.
        question, answer: text; neither may be empty.
        max_length: most tokens allowed, EOS included. Nothing is ever truncated.

    Returns:
        Encoded, whose prompt part equals `encode_prompt(tokenizer, question)`.

    Raises:
        ValueError: longer than max_length; no EOS token, or one inside the answer; the answer
            changes the prompt's tokens.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer has no eos_token; set one, an answer must end with it")
    if tokenizer.eos_token in answer:
        raise ValueError(
            f"answer {answer[:60]!r} holds the tokenizer's eos_token {tokenizer.eos_token!r}, "
            "which would end it there; remove it from the text"
        )
    prompt = encode_prompt(tokenizer, question)
    full = _tokens(tokenizer, _render(tokenizer, question, answer))
    if full[: len(prompt)] != prompt or len(full) == len(prompt):
        raise ValueError(
            "the prompt's tokens are not a proper prefix of prompt + answer, so the answer cannot "
            f"be told apart (question {question!r}). Does the tokenizer add EOS to every text, or "
            "its chat_template depend on the answer? Turn that off, or set chat_template = None"
        )
    # Chat templates often close with EOS and a line break that no generation would reach.
    answer_ids = full[len(prompt) :]
    if eos in answer_ids:
        answer_ids = answer_ids[: answer_ids.index(eos)]
    ids = [*prompt, *answer_ids, eos]
    if len(ids) > max_length:
        raise ValueError(
            f"question {question[:60]!r} takes {len(ids)} tokens with its answer, max_length is "
            f"{max_length}; raise max_length or shorten the text"
        )
    return Encoded(ids, len(prompt))


def _render(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None = None) -> str:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        from jinja2 import TemplateError

        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat_template refuses a user message with its answer ({error}); "
                "correct it, or set chat_template = None"
            ) from error
    # The space goes with the answer: BPE vocabularies hold it as part of the first word.
    return f"Question: {question}\nAnswer:" + ("" if answer is None else f" {answer}")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A chat template writes its own special tokens.
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return list(ids)


def collate(
    encoded: Sequence[Encoded], pad_token_id: int, *, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest, and on to a multiple of `multiple` tokens.

    Returns:
        input_ids [B,T] long, attention_mask [B,T] long (1 = token), labels [B,T] long: input_ids
        in the answer and its EOS, -100 elsewhere; not shifted, as transformers models expect.

    Raises:
        ValueError: no sequences, or no pad token id.
    """
    if not encoded:
        raise ValueError("collate: no sequences to pad")
    if pad_token_id is None:
        raise ValueError("collate: pad_token_id is None; use the tokenizer's eos_token_id")
    longest = max(map(len, encoded))
    shape = len(encoded), longest + -longest % multiple
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for row, item in enumerate(encoded):
        ids = torch.tensor(item.input_ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, item.answer_start : len(ids)] = ids[item.answer_start :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, else its EOS: what stands there is masked anyway."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def length_batches(encoded: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Group indices into batches of at most max_tokens tokens, padding included, longest first.

    Longest first, so that a batch that does not fit in memory fails at once. Ties keep their order.

    Raises:
        ValueError: one sequence alone is longer than max_tokens.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    if order and len(encoded[order[0]]) > max_tokens:
        raise ValueError(
            f"sequence {order[0]} has {len(encoded[order[0]])} tokens, max_tokens is {max_tokens}; "
            "raise max_tokens"
        )
    batches: list[list[int]] = []
    width = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(encoded[index])
        batches[-1].append(index)
    return batches
