"""NSRU unlearning: data, trainer, evaluation, command line and report.

``import nsru_train`` gives what a script needs, each name imported when it is first used.
"""

from typing import TYPE_CHECKING

__all__ = [
    "QA",
    "Data",
    "DataConfig",
    "Evaluation",
    "ForgetRetain",
    "Guarded",
    "LoraConfig",
    "Method",
    "ModelConfig",
    "NSRUTrainer",
    "Objective",
    "Outcome",
    "SafeTargets",
    "SubspaceConfig",
    "TrainConfig",
    "UnlearnDataset",
    "before_and_after",
    "describe_ordinary",
    "evaluate",
    "find_method",
    "find_subspaces",
    "format_probabilities",
    "format_table",
    "greedy_answers",
    "load_adapter",
    "load_model",
    "load_records",
    "ordinary_answers",
    "prepare_dataset",
    "probability_sets",
    "save_adapter",
    "save_records",
    "to_results",
    "unlearn",
]

if TYPE_CHECKING:
    from nsru_train.adapters import load_adapter, save_adapter
    from nsru_train.answering import greedy_answers
    from nsru_train.config import (
        DataConfig,
        LoraConfig,
        ModelConfig,
        Objective,
        SubspaceConfig,
        TrainConfig,
    )
    from nsru_train.data import QA, SafeTargets
    from nsru_train.estimating import find_subspaces
    from nsru_train.eval_results import (
        Evaluation,
        format_probabilities,
        format_table,
        to_results,
    )
    from nsru_train.evaluation import before_and_after, evaluate, probability_sets
    from nsru_train.loading import Data, load_model
    from nsru_train.methods import ForgetRetain, Method, find_method
    from nsru_train.ordinary import describe_ordinary, ordinary_answers
    from nsru_train.pipeline import Guarded, Outcome, unlearn
    from nsru_train.sources import load_records, save_records
    from nsru_train.trainer import NSRUTrainer, prepare_dataset
    from nsru_train.unlearn_dataset import UnlearnDataset
else:
    # From light to heavy: a name is looked up in these until one has it.
    _MODULES = (
        "data",
        "sources",
        "config",
        "methods",
        "eval_results",
        "answering",
        "adapters",
        "evaluation",
        "ordinary",
        "loading",
        "trainer",
        "estimating",
        "pipeline",
    )

    def __getattr__(name):
        from importlib import import_module

        for module in _MODULES if name in __all__ else ():
            home = import_module(f"nsru_train.{module}")
            if hasattr(home, name):
                globals()[name] = getattr(home, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
