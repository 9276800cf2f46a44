"""A small Llama made on the spot: tokenizer, random weights, memorised questions and answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from nsru_train.data.encode import Encoded, collate, encode_qa
from nsru_train.losses.nll import AnswerHidden, answer_states
from nsru_train.scoring import quick_probabilities

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from nsru_train.data.records import QA

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with <pad>, <s> and </s>; every text starts with <s>.

    Args:
        texts: training texts; any other text can still be encoded, byte by byte.
        vocab_size: upper limit; fewer tokens come out when the texts offer fewer merges.

    Raises:
        ValueError: vocab_size below 259 (256 bytes and three special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    if vocab_size < _BYTES + len(special):
        raise ValueError(f"vocab_size must be at least {_BYTES + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def make_llama(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 352,
    max_length: int = 512,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Build a random fp32 Llama for the tokenizer; the global random state is left as it was.

    kv_heads below heads gives q_proj and k_proj different out_features, as in real models.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def memorise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[QA],
    *,
    epochs: int = 60,
    max_seconds: float | None = None,
    lr: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
    target_nll: float = 0.01,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    bf16: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train every weight on the answers until their mean NLL per token is at most target_nll.

    AdamW with linear warm-up and a cosine over `epochs`; the same seed gives the same weights.
    Batches hold sequences of similar length, and the output head sees answer positions only.

    Args:
        model: a Llama-like model, whose lm_head alone turns hidden states into logits.
        records: what to memorise.
        epochs: most passes over the records, and the length of the cosine.
        max_seconds: stop after this time even when the target is not reached.
        bf16: autocast the matrix products to bfloat16.
        progress: show one line with epoch, NLL and tokens per second.

    Returns:
        epochs, steps, seconds, tokens (padding excluded), tokens_per_second, nll (last epoch's
        mean), probability (mean over answers of exp(-mean token NLL) afterwards), reached (bool).
    """
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]
    if not encoded:
        raise ValueError("memorise: records is empty")
    steps_per_epoch = math.ceil(len(encoded) / batch_size)
    total = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step / total, warmup)
    )
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    bar = _progress_bar(total, progress)
    start = time.perf_counter()
    tokens = steps = epoch = 0
    nll = math.inf
    out_of_time = False
    while epoch < epochs and nll > target_nll and not out_of_time:
        nll_sum, answer_tokens = 0.0, 0
        for indices in _epoch_batches(encoded, batch_size, generator):
            batch = [encoded[i] for i in indices]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                token_nll = _answer_nll(model, batch, tokenizer.pad_token_id)
            token_nll.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            nll_sum += token_nll.sum().item()
            answer_tokens += token_nll.numel()
            tokens += sum(map(len, batch))
            steps += 1
            bar.update()
            elapsed = time.perf_counter() - start
            out_of_time = max_seconds is not None and elapsed >= max_seconds
            if out_of_time:
                break
        nll = nll_sum / answer_tokens
        epoch += 1
        bar.set_postfix(epoch=epoch, nll=f"{nll:.4f}", tok_s=f"{tokens / elapsed:.0f}")
    bar.close()
    model.eval()
    return {
        "epochs": epoch,
        "steps": steps,
        "seconds": elapsed,
        "tokens": tokens,
        "tokens_per_second": tokens / elapsed,
        "nll": nll,
        "probability": quick_probabilities(model, tokenizer, encoded),
        "reached": nll <= target_nll,
    }


def _answer_nll(
    model: LlamaForCausalLM, batch: Sequence[Encoded], pad_token_id: int
) -> torch.Tensor:
    """NLL [T] of the answer tokens of a batch, differentiable in every weight.

    oneDNN keeps compiled code for each bf16 shape, gigabytes in all. So there are few shapes:
    lengths are multiples of 16, counts of answer tokens multiples of 256.
    """
    padded = collate(batch, pad_token_id, multiple=16)
    # Padding is on the right, so causal attention alone keeps it out; no mask, faster attention.
    inputs = {name: padded[name].to(model.device) for name in ("input_ids", "labels")}
    states = answer_states(model, inputs)
    assert isinstance(states, AnswerHidden)  # a Llama's head is a plain linear
    count = len(states.targets)
    # Not states.nll(), which computes the logits a second time for the head's gradient.
    logits = model.lm_head(F.pad(states.hidden, (0, 0, 0, -count % 256)))[:count]
    return F.cross_entropy(logits.float(), states.targets, reduction="none")


def _epoch_batches(
    encoded: Sequence[Encoded], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Random batches of similar length: sort pools of eight batches, then shuffle the batches."""
    order = torch.randperm(len(encoded), generator=generator).tolist()
    pool = 8 * batch_size
    batches = []
    for begin in range(0, len(order), pool):
        chunk = sorted(order[begin : begin + pool], key=lambda i: len(encoded[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _warm_cosine(fraction: float, warmup: float) -> float:
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def _progress_bar(total: int, enabled: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not enabled, desc="memorise", unit="step")
