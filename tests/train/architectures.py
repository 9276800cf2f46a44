"""Model families made tiny, and what becomes of each from the estimate to a merge.

python tests/train/architectures.py    # writes docs/support.md again
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

import nsru_kernels as nk
from nsru_kernels.nn.experts import is_experts
from nsru_train.losses.nll import answer_nll

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
HEAD = "| model_type | adapted | left as they are |\n|---|---|---|\n"
ROWS = re.compile(re.escape(HEAD) + r"(\|.*\n)*")
VOCABULARY = 99
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Their own names for sizes, or sizes that fit the small ones.
AS_THEY_ARE = (
    "llama mistral qwen2 phi phi3 gpt2 gpt_neox gpt_bigcode bloom falcon stablelm starcoder2 "
    "cohere olmo olmo2 granite nemotron persimmon"
)
OF_HEADS = "qwen3 gemma gemma2 gemma3_text smollm3 glm4 exaone4"
CAUSAL: dict[str, dict] = {
    **{kind: {} for kind in AS_THEY_ARE.split()},
    **{kind: {"head_dim": 8} for kind in OF_HEADS.split()},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": {
        "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}  # fmt: skip
SEQ2SEQ: dict[str, dict] = {
    "t5": {
        "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    },
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
VISION: dict[str, dict] = {  # their text part alone
    "qwen2_vl": {
        "text_config": {**SIZES, "rope_parameters": ROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    },
    "llava": {
        "text_config": {**SIZES, "model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    },
}  # fmt: skip
FAMILIES = {**CAUSAL, **SEQ2SEQ, **VISION}


def make(kind: str, **settings) -> torch.nn.Module:
    """A random model of this kind."""
    sizes = {**({} if kind in VISION else SIZES), **FAMILIES[kind], **settings}
    auto = AutoModelForCausalLM
    if kind in SEQ2SEQ:
        auto = AutoModelForSeq2SeqLM
    elif kind in VISION:
        auto = AutoModelForImageTextToText
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()


def walk(kind: str, folder: Path) -> nk.SwapReport:
    """From the estimate to a merge; AssertionError where a step does not do what it should."""
    base = make(kind)
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    retain, forget = torch.randint(3, VOCABULARY, (2, 4, 12), generator=generator).unbind()

    def batch(ids):
        return {"input_ids": ids, **({"decoder_input_ids": ids} if kind in SEQ2SEQ else {})}

    def logits(network):
        with torch.no_grad():
            return network(**batch(forget)).logits

    targets = ["all-linear"]
    if any(map(is_experts, model.modules())):
        targets.append("experts")
    subspaces = nk.estimate_retain_subspaces(
        model, [batch(retain)], targets, width=48, rank=3, progress=False
    )
    report = nk.swap_linears(model, targets, rank=2, alpha=4, subspaces=subspaces)
    before = logits(base)
    torch.testing.assert_close(logits(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    for _ in range(2):
        (-model(input_ids=forget, labels=forget).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    still = [name for name, p in trained.items() if "lora_B" in name and not p.any()]
    assert not still
    wanted = logits(model)
    moved = (wanted - before).abs().max()
    assert moved > 1e-3, f"training moved the logits by {moved:.1e} alone"
    assert max(m.leakage() for m in model.modules() if isinstance(m, nk.NSRULinear)) < 1e-6
    if kind in CAUSAL:
        labelled = {**batch(forget), "attention_mask": torch.ones_like(forget), "labels": forget}
        nll, _ = answer_nll(model, labelled)
        torch.testing.assert_close(nll.mean(), model(**labelled).loss)
    nk.save_lora_adapter(model, folder)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    again = copy.deepcopy(base)
    nk.load_lora_adapter(again, folder)
    nk.merge_adapters(model)
    for name, network in (("PEFT", served), ("read back", again), ("merged", model)):
        off = (logits(network) - wanted).abs().max()
        assert off < 1e-3 * moved + 2e-6, f"{name}: logits are off by {off:.1e} of {moved:.1e}"
    return report


def row(kind: str, report: nk.SwapReport) -> str:
    """A line of the table."""
    ends = dict.fromkeys(
        "experts" if ".experts." in name else name.rpartition(".")[2] for name in report.swapped
    )
    left = dict.fromkeys(
        f"{name.rpartition('.')[2]}: {reason}"
        for name, reason in report.skipped.items()
        if not reason.startswith(("output embedding", "not among", "outside of the text part"))
    )
    which = f"{kind} (text part)" if kind in VISION else kind
    return f"| {which} | {', '.join(ends)} | {'; '.join(left)} |\n"


def table(text: str) -> dict[str, str]:
    """Kind → its line of a page."""
    rows = ROWS.search(text)[0].removeprefix(HEAD).splitlines(keepends=True)
    return {line.split()[1]: line for line in rows}


def main() -> None:
    rows = []
    for kind in FAMILIES:
        print(kind, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(kind, walk(kind, Path(folder))))
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(ROWS.sub(lambda _: HEAD + "".join(rows), text), encoding="utf-8")


if __name__ == "__main__":
    main()
