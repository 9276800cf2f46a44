"""OpenUnlearning's own programs with our methods and adapters; none of its files is changed.

    python -m nsru_train.open_unlearning --repo DIR experiment=unlearn/tofu/default trainer=NSRU
        task_name=NAME trainer.args.learning_rate=5e-4 …

What follows --repo is Hydra's. Beside theirs there are these trainers, each with LoRA that may be
confined to the null space of the retain set's activations (trainer.method_args.lora.project):

    NSRU, NSRU_npo, NSRU_rmu, …   our methods in our training loop, their evaluation
    NPO_LoRA, RMU_LoRA, …         their methods, as they are, on our adapters

It is written for locuslab/open-unlearning at d3d7cf9, and runs it on the versions of transformers
and datasets that are installed here instead of those that it pins.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from nsru_train.open_unlearning.checkout import register, use_checkout
from nsru_train.open_unlearning.settings import fit_to_machine, read_tofu_from


def main(args: Sequence[str] | None = None) -> None:
    """Run src/train.py of a checkout, or src/eval.py where the configuration is eval.yaml."""
    parser = argparse.ArgumentParser(
        prog="python -m nsru_train.open_unlearning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--repo", required=True, help="checkout of locuslab/open-unlearning")
    parser.add_argument("--config-name", default="unlearn.yaml", help="unlearn, train or eval.yaml")
    parser.add_argument("--data-dir", help="folder with TOFU's NAME.json files instead of the hub")
    known, overrides = parser.parse_known_args(args)
    try:
        repo = use_checkout(known.repo)
        register()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    import hydra

    name = "eval" if known.config_name.removesuffix(".yaml") == "eval" else "train"
    program = importlib.import_module(name).main.__wrapped__

    @hydra.main(version_base=None, config_path=str(repo / "configs"), config_name=known.config_name)
    def run(config: Any) -> None:
        fit_to_machine(config, hydra.core.hydra_config.HydraConfig.get().overrides.task)
        if known.data_dir is not None:
            read_tofu_from(config, known.data_dir)
        program(config)

    given, sys.argv = sys.argv, [str(repo / "src" / f"{name}.py"), *overrides]
    try:
        run()
    finally:
        sys.argv = given


if __name__ == "__main__":
    main()
