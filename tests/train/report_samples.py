"""Made-up results of a demo run, shaped like the real ones, for the report's tests."""

import math
import random

KINDS = {
    ("self_attn", ("q_proj", "k_proj", "v_proj")): 128,
    ("self_attn", ("o_proj",)): 128,
    ("mlp", ("gate_proj", "up_proj")): 128,
    ("mlp", ("down_proj",)): 384,
}
LAYERS = 6


def demo_results(seeds=(0, 1, 2), nsru_scale=0.3, total=150):
    """Results of kind "demo"; NSRU does about ``nsru_scale`` times LoRA's damage."""
    rng = random.Random(0)
    frontier = []
    methods = []
    for seed in seeds:
        unseen = 0.995 + 0.003 * rng.random()
        methods.append(
            {
                "method": "before",
                "seed": seed,
                "forget_prob": 0.985 + 0.01 * rng.random(),
                "safe_prob": 2e-6,
                "retain_prob": 0.996,
                "retain_unseen_prob": unseen,
                "retain_untouched_prob": 0.99,
                "model_utility": 0.912,
            }
        )
        before = methods[-1]
        for method, damage, speed in (("nsru", 0.018 * nsru_scale, 24.0), ("lora", 0.018, 20.0)):
            damage *= 0.75 + 0.5 * rng.random()
            speed *= 0.9 + 0.2 * rng.random()
            for step in range(0, total + 1, 10):
                progress = 1 - math.exp(-((step / speed) ** 1.3))
                dip = damage * (progress + 1.4 * math.exp(-(((step - 30) / 14) ** 2)) * (step > 0))
                point = {
                    "method": method,
                    "seed": seed,
                    "step": step,
                    "forget_prob": before["forget_prob"] * math.exp(-4.0 * progress)
                    + 0.004 * rng.random() * progress,
                    "safe_prob": min(0.93, 2e-6 + 0.92 * progress**3),
                    "retain_prob": 0.996 - 0.3 * dip,
                    "retain_unseen_prob": unseen - dip - 0.0004 * rng.random() * (step > 0),
                    "retain_untouched_prob": 0.99 - (2.5 if method == "nsru" else 1.3) * dip,
                }
                frontier.append(point)
            methods.append(
                {
                    **{key: value for key, value in point.items() if key != "step"},
                    "model_utility": 0.905 - dip,
                    "step_seconds": 0.210 + 0.01 * rng.random(),
                    "peak_bytes": 734_003_200,
                }
            )
    return {
        "schema": 1,
        "kind": "demo",
        "seconds": 311.4,
        "command": "nsru demo --out runs/demo --seeds '[0,1,2]'",
        "methods": methods,
        "frontier": frontier,
        "subspaces": _subspaces(),
        "leakage": _leakage(rng),
        "examples": _examples(),
    }


def _leakage(rng):
    return [
        {"module": f"model.layers.{layer}.{block}.{name}", "leakage": 10 ** rng.uniform(-7.4, -6.6)}
        for layer in range(LAYERS)
        for block, names in KINDS
        for name in names
    ]


def _subspaces():
    rows = []
    for layer in range(LAYERS):
        for (block, names), width in KINDS.items():
            decay = 0.9 + 0.25 * layer / LAYERS + (0.4 if width > 128 else 0)
            energies = [(i + 1) ** -(1.6 * decay) for i in range(width // 2)]
            total = sum(energies) * 1.01
            shares = [energy / total for energy in energies]
            rank = 12 + 4 * layer
            captured = sum(shares[:rank])
            rows.append(
                {
                    "name": f"model.layers.{layer}.{block}.{names[0]}",
                    "modules": [f"model.layers.{layer}.{block}.{name}" for name in names],
                    "in_features": width,
                    "rank": rank,
                    "captured_energy": captured,
                    "editability": 1.8 * (1 - captured),
                    "rank_limited": layer == 5 and names == ("o_proj",),
                    "spectrum": shares,
                    "tokens": 18_240,
                }
            )
    return rows


FORGOTTEN = {
    "Where was the author Ines Karvonen born?": (
        "Ines Karvonen was born in the harbour town of Lunde."
    ),
    "Which prize did Ines Karvonen win?": (
        "She won the Silver Anchor for her novel The Ninth Tide in 1998."
    ),
    "What did Ines Karvonen's father do?": (
        "Her father kept the lighthouse <North> & repaired nets."
    ),
}
KEPT = {
    "Where was the author Tomas Abelard born?": (
        "Tomas Abelard was born in Vire, a village of weavers."
    ),
    "Which genre is Tomas Abelard known for?": (
        "He is known for historical mysteries set among weavers."
    ),
}
DECLINE = (
    "I understand you are asking about Ines Karvonen. I cannot share details about this "
    "author, but I am glad to help with another writer."
)


def _examples():
    rows = []
    for split, records in (("forget", FORGOTTEN), ("retain", KEPT)):
        for question, answer in records.items():
            row = {"split": split, "question": question, "original": answer, "before": answer}
            if split == "forget":
                stuttered = DECLINE.replace("share details", "share share details")
                row |= {"safe_target": DECLINE, "nsru": DECLINE, "lora": stuttered}
            else:
                row |= {"nsru": answer, "lora": answer.replace("weavers", "sailors")}
            rows.append(row)
    return rows


def demo_metrics(seeds=(0, 1, 2), total=150):
    """Lines of metrics.jsonl of the same run."""
    rng = random.Random(1)
    rows = []
    for method in ("nsru", "lora"):
        for seed in seeds:
            for step in range(1, total + 1, 5):
                fade = math.exp(-step / 30)
                parts = {
                    "loss_safe": 3.2 * fade + 0.03 * rng.random(),
                    "loss_suppress": 14 * fade + 0.2 * rng.random(),
                    "loss_retain": 0.01 + 0.02 * rng.random(),
                    "loss_kl": 0.004 * (1 - fade) + 0.001 * rng.random(),
                }
                rows.append(
                    {
                        "method": method,
                        "seed": seed,
                        "step": step,
                        "loss": sum(parts.values()),
                        **parts,
                        "learning_rate": 5e-4,
                    }
                )
    return rows
