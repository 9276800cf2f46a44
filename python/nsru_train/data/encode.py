"""Token encoding of question-answer pairs, padding, and batches by length."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from nsru_train.data.records import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_LISTS = {"tools", "documents"}  # arguments of apply_chat_template that templates read
_GIVEN = {"messages", "raise_exception", "strftime_now"}  # by transformers, to each template
# Stand for an answer and a question; letters alone pass through every template.
_ANSWER, _QUESTION = "qzanswerqz", "qzquestionqz"


@dataclass
class Encoded:
    """input_ids of prompt and answer; input_ids[answer_start:] is scored and trained.

    The last `closing` of them end the turn (EOS, `<end_of_turn>`, …); `answer` is the text's own.
    """

    input_ids: list[int]
    answer_start: int
    closing: int = 1

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer(self) -> list[int]:
        """The answer's own tokens."""
        return self.input_ids[self.answer_start : len(self) - self.closing]


@dataclass(frozen=True)
class TextFormat:
    """Settings of the text of a question and its answer that a tokenizer does not have.

    Args:
        system_prompt: content of a system message before the question.
        template_kwargs: further variables of the chat template, such as enable_thinking.
        end_tokens: ids that end an answer beside the tokenizer's EOS, such as those of a
            generation_config.
        max_length: most tokens that the model can take; None for no limit but encode_qa's own.
        truncate: cut answers that are too long instead of refusing them.
        apart: prompt and answer are texts of their own, as an encoder-decoder reads them.
    """

    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_tokens: frozenset[int] = frozenset()
    max_length: int | None = None
    truncate: bool = False
    apart: bool = False


class TooLongError(ValueError):
    """A text takes more tokens than allowed."""


def use_format(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> None:
    """Let `encode_prompt` and `encode_qa` write this tokenizer's texts in the format.

    Raises:
        ValueError: the tokenizer has no chat template where one is needed, or a template that does
            not read a variable.
    """
    system, given = text_format.system_prompt, text_format.template_kwargs
    if system is not None:
        check_text("system_prompt", system)
    template = tokenizer.chat_template
    if (system is not None or given) and not template:
        raise ValueError(
            "system_prompt and chat_template_kwargs need a chat template, and the tokenizer has "
            "none; leave them out, or set tokenizer.chat_template"
        )
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - _LISTS
    known = _variables(template) - taken - _GIVEN if given else set()
    if unread := sorted(given.keys() - known):
        raise ValueError(
            f"chat_template_kwargs: the tokenizer's chat template does not read {unread[0]!r}; "
            f"it reads {', '.join(sorted(known)) or 'no variable of yours'}"
        )
    if system is not None:
        without = replace(text_format, system_prompt=None)
        said, unsaid = (_render(tokenizer, _QUESTION, None, f) for f in (text_format, without))
        if said == unsaid:
            raise ValueError(
                "system_prompt: the tokenizer's chat template leaves a system message out; leave "
                "system_prompt out too, or correct the template"
            )
    if template and _QUESTION not in _render(tokenizer, _QUESTION, None, text_format).lower():
        raise ValueError(
            "the tokenizer's chat template leaves the question out; correct it, or set "
            "chat_template = None"
        )
    tokenizer.text_format = text_format


def _variables(template: str | Mapping[str, str]) -> set[str]:
    """Variables that a chat template, or each of several, reads and does not set itself."""
    from jinja2 import Environment, TemplateError, meta

    parser = Environment(extensions=["jinja2.ext.loopcontrols"])
    found: set[str] = set()
    for text in [template] if isinstance(template, str) else template.values():
        # transformers' own tag around what an assistant says
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        try:
            found |= meta.find_undeclared_variables(parser.parse(plain))
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat_template cannot be read: {error}") from error
    return found


def format_of(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """The format given by `use_format`, else the default."""
    return getattr(tokenizer, "text_format", None) or TextFormat()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokens that precede an answer: the chat template's, else "Question: …\\nAnswer:".

    They reach to where the template writes the answer: an empty `<think>` block that it puts there
    belongs to them, so that training, scores and generated answers all begin at the same place.

    Raises:
        ValueError: the chat template refuses the question, or depends on the answer.
    """
    return _tokens(tokenizer, prompt_text(tokenizer, question))


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text of `encode_prompt`."""
    return _prompt_text(_around_answer(tokenizer, question)[0])


def served_otherwise(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The end of a server's prompt that is not the one of `encode_prompt`, in words; None else.

    A template may open a thought in its generation prompt, and write past answers without one; or
    end it in a space, which is trained as part of the answer's first word.
    """
    if not tokenizer.chat_template:
        return None
    trained, served = prompt_text(tokenizer, _QUESTION), _render(tokenizer, _QUESTION)
    if served == trained:
        return None
    shared = _shared(trained, served)
    ends = trained[shared:], served[shared:]
    return (
        f"the chat template ends the prompt in {ends[0]!r} before an answer that is there, which "
        f"is trained and scored, but in {ends[1]!r} before one that is to come, as it is served. "
        "Make them agree, by chat_template_kwargs such as enable_thinking or another chat template"
    )


def dated(tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """The variable of the chat template that holds the date in its prompts → today's.

    Empty where it has none, as Granite's; None where the template writes no date.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    text = _render(tokenizer, _QUESTION)
    timeless = template.replace("strftime_now", "'{}'.format")
    if text == _render(tokenizer, _QUESTION, template=timeless):
        return None
    formats = re.findall(r"strftime_now\(\s*['\"](.+?)['\"]\s*\)", template)
    own = format_of(tokenizer)
    for name in sorted(name for name in _variables(template) if "date" in name):
        for today in (datetime.now().strftime(one) for one in formats):  # as transformers has it
            fixed = replace(own, template_kwargs={**own.template_kwargs, name: today})
            if _render(tokenizer, _QUESTION, text_format=fixed) == text:
                return {name: today}
    return {}


def find_question(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> tuple[str, int]:
    """(question, its prompt's tokens) of what `encode_prompt` or `encode_qa` wrote.

    Of a conversation, all that stands before the last answer. Anything else is a prompt as a whole:
    its text without special tokens, and the number of all tokens.
    """
    ids = list(input_ids)
    parts = prompt_text(tokenizer, _QUESTION).split(_QUESTION)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    start, end = text.find(parts[0]), text.rfind(parts[-1])
    if len(parts) != 2 or not 0 <= start <= end - len(parts[0]):
        return tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)
    question = text[start + len(parts[0]) : end]
    prompt = encode_prompt(tokenizer, question)
    return question, len(prompt) if ids[: len(prompt)] == prompt else len(ids)


def encode_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that precede any question: the chat template's, else BOS or what stands for it."""
    if tokenizer.chat_template:
        return _tokens(tokenizer, _render(tokenizer, _ANSWER).partition(_ANSWER)[0])
    bos = tokenizer.bos_token_id
    return [tokenizer.eos_token_id if bos is None else bos]


def request_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token or word that the chat template writes next after a question: `<|im_end|>`, say.

    Raises:
        ValueError: there is no chat template, or it writes nothing there.
    """
    after = _around_answer(tokenizer, _QUESTION)[0].split(_QUESTION)[-1].lstrip()
    if not tokenizer.chat_template or not after:
        raise ValueError("no chat template says where a request ends")
    first = _tokens(tokenizer, after)[0]
    return tokenizer.decode([first]) if first in _added_tokens(tokenizer) else after.split()[0]


def encode_qa(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, *, max_length: int = 512
) -> Encoded:
    """Encode prompt + answer + what ends the turn.

    The turn ends with the first token after the answer that is EOS, one of the format's end_tokens
    or a token added to the vocabulary, such as `<end_of_turn>`; with EOS where there is none.

    Args:
        tokenizer: its chat_template is used when it has one; see also `use_format`.
        question, answer: text; neither may be empty.
        max_length: most tokens allowed, those that end the turn included.

    Returns:
        Encoded, whose prompt part equals `encode_prompt(tokenizer, question)`.

    Raises:
        TooLongError: longer than max_length, and the format does not truncate.
        ValueError: no EOS token; an end token inside the answer; the answer changes the prompt's
            tokens.
    """
    encoded, limit = _encode_whole(tokenizer, question, answer), _limit(tokenizer, max_length)
    excess, start = len(encoded) - limit, encoded.answer_start
    if excess > 0 and format_of(tokenizer).truncate and start < limit:
        return Encoded(encoded.input_ids[:limit], start, max(0, encoded.closing - excess))
    if excess > 0:
        raise TooLongError(
            f"question {question[:60]!r} takes {len(encoded)} tokens with its answer, max_length "
            f"is {limit}; raise max_length or shorten the text"
            + (" (the model has no more positions)" if limit < max_length else "")
        )
    return encoded


def is_too_long(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, *, max_length: int
) -> bool:
    """True where `encode_qa` refuses this, or cuts it where the format truncates."""
    return len(_encode_whole(tokenizer, question, answer)) > _limit(tokenizer, max_length)


def _limit(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    return min(max_length, format_of(tokenizer).max_length or max_length)


def _encode_whole(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Encoded:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer has no eos_token; set one, an answer must end with it")
    if format_of(tokenizer).apart:
        prompt = encode_prompt(tokenizer, question)
        own = list(tokenizer(text_target=answer).input_ids)
        if own[-1:] != [eos]:
            own.append(eos)
        if eos in own[:-1]:
            raise ValueError(_ended_inside(tokenizer, answer, eos))
        return Encoded(prompt + own, len(prompt))
    before, after = _around_answer(tokenizer, question)
    text = _render(tokenizer, question, answer)
    answered = text.removesuffix(after)
    prompt, full = _tokens(tokenizer, _prompt_text(before)), _tokens(tokenizer, text)
    start = len(prompt)
    if not answered.startswith(before) or answered + after != text:
        raise ValueError(_not_a_prefix(question))
    if full[:start] != prompt:
        parting = max(0, _shared(prompt, full) - 1)
        alone, followed = (
            " ".join(tokenizer.convert_ids_to_tokens(ids[parting:stop]))
            for ids, stop in ((prompt, start), (full, start + 1))
        )
        border = f": it ends in {alone}, and in {followed} where the answer follows"
        raise ValueError(_not_a_prefix(question, border))
    # A token that joins the answer's end with what follows counts as the answer's.
    unclosed = _tokens(tokenizer, answered)
    end = _shared(unclosed, full)
    end += end < len(unclosed)
    if end <= start:
        raise ValueError(_not_a_prefix(question))
    closing = full[end:]
    ends = {eos, *format_of(tokenizer).end_tokens}
    added = _added_tokens(tokenizer) if closing else set()
    stop = next((i for i, token in enumerate(closing) if token in ends | added), None)
    # Chat templates often go on with a line break that no generation would reach.
    closing = [*closing, eos] if stop is None else closing[: stop + 1]
    if inside := (ends | {closing[-1]}) & set(full[start:end]):
        raise ValueError(_ended_inside(tokenizer, answer, min(inside)))
    return Encoded(full[:end] + closing, start, len(closing))


def _around_answer(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[str, str]:
    """Texts before and after an answer, found by rendering with one and without."""
    before, *after = _render(tokenizer, question, _ANSWER).split(_ANSWER)
    if len(after) != 1:
        raise ValueError(
            f"the tokenizer's chat_template writes an answer {len(after)} times (question "
            f"{question[:60]!r}); correct it, or set chat_template = None"
        )
    # Templates may open a turn in another way than they write a past one, with `<think>` or
    # without, but what comes before the turn must be the same.
    opened = _render(tokenizer, question)
    shared = before[: _shared(before, opened)]
    if shared != opened and question.strip() not in shared:
        raise ValueError(_not_a_prefix(question))
    return before, after[0]


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special and other added tokens, but not the line breaks among Gemma's."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def _ended_inside(tokenizer: PreTrainedTokenizerBase, answer: str, token: int) -> str:
    return (
        f"answer {answer[:60]!r} holds {tokenizer.decode([token])!r}, which would end it there; "
        "remove it from the text"
    )


def _not_a_prefix(question: str, border: str = "") -> str:
    return (
        "the prompt's tokens are not a proper prefix of prompt + answer, so the answer cannot "
        f"be told apart (question {question[:60]!r}){border}. Does the tokenizer add EOS to every "
        "text, or its chat_template depend on the answer, or end its prompt in white space that "
        "joins the answer? Turn that off (add_eos_token=False), or set chat_template = None"
    )


def _prompt_text(before: str) -> str:
    # The space goes with the answer: BPE vocabularies hold it as part of the first word.
    return before.rstrip(" ")


def _render(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str | None = None,
    text_format: TextFormat | None = None,
    template: str | None = None,
) -> str:
    if not tokenizer.chat_template:
        return f"Question: {question}\nAnswer: {answer or ''}"
    text_format = text_format or format_of(tokenizer)
    contents = {"system": text_format.system_prompt, "user": question, "assistant": answer}
    messages = [
        {"role": role, "content": text} for role, text in contents.items() if text is not None
    ]
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answer is None,
            chat_template=template,
            **text_format.template_kwargs,
        )
    except TemplateError as error:
        roles = " and ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat_template refuses messages of {roles} ({error}); correct it, "
            "set chat_template = None, or leave out system_prompt where it takes none"
        ) from error


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


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


def pad_token_id(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> int:
    """The tokenizer's pad token where it and the model's embedding have one, else its EOS.

    What stands there is masked anyway.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        return tokenizer.eos_token_id
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    missing = embedding is not None and pad >= embedding.weight.shape[0]
    return tokenizer.eos_token_id if missing else pad


def length_batches(encoded: Sequence[Encoded], max_tokens: int = 4096) -> list[list[int]]:
    """Group indices into batches of at most max_tokens tokens, padding included, longest first.

    A single longer sequence gets its own batch. Longest first, so that a batch that does not fit in
    memory fails at once. Ties keep their order.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    batches: list[list[int]] = []
    width = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(encoded[index])
        batches[-1].append(index)
    return batches
