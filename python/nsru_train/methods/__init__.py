"""Methods of unlearning, one file each: what an item holds, what the loss needs, the loss."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from nsru_train.data.records import QA
from nsru_train.methods.alter import ALTER
from nsru_train.methods.altpo import AltPO
from nsru_train.methods.ceu import CEU
from nsru_train.methods.dpo import DPO
from nsru_train.methods.eco import ECO
from nsru_train.methods.ga import GA
from nsru_train.methods.graddiff import GradDiff
from nsru_train.methods.idk import IDK
from nsru_train.methods.ihl import IHL
from nsru_train.methods.kl import KL
from nsru_train.methods.lune import LUNE
from nsru_train.methods.method import Forget, ForgetRetain, Method, say_once
from nsru_train.methods.npo import NPO
from nsru_train.methods.nsru import Objective
from nsru_train.methods.pdu import PDU
from nsru_train.methods.rmu import RMU
from nsru_train.methods.satimp import SatImp
from nsru_train.methods.simnpo import SimNPO
from nsru_train.methods.task_vector import TaskVector
from nsru_train.methods.undial import UNDIAL
from nsru_train.methods.wga import WGA

__all__ = [
    "METHODS",
    "Forget",
    "ForgetRetain",
    "Method",
    "Objective",
    "check_records",
    "find_method",
    "method_of_run",
    "run_name",
]

METHODS: dict[str, type[Method]] = {
    "nsru": Objective,
    "ga": GA,
    "graddiff": GradDiff,
    "kl": KL,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "altpo": AltPO,
    "idk": IDK,
    "rmu": RMU,
    "undial": UNDIAL,
    "wga": WGA,
    "satimp": SatImp,
    "ceu": CEU,
    "ihl": IHL,
    "pdu": PDU,
    "lune": LUNE,
    "alter": ALTER,
    "eco": ECO,
    "task_vector": TaskVector,
}


# Other names of methods in papers and public code.
_KNOWN_AS = {
    "loku": "ihl",
    "gradascent": "ga",
    "gradient_ascent": "ga",
    "graddescent": "graddiff",
    "gradient_difference": "graddiff",
    "idkdpo": "dpo",
    "refusal": "idk",
    "lora": "nsru (with lora.project false)",
}


def find_method(name: str) -> type[Method]:
    """The method of that name, or the class that "package.module:Class" names.

    Args:
        name: a key of ``METHODS``, or where your own class is.

    Returns:
        The class; its fields are the settings: ``find_method("npo")(beta=0.1)``.

    Raises:
        ValueError: there is none.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        if name in METHODS:
            return METHODS[name]
        close = difflib.get_close_matches(name.lower(), {**METHODS, **_KNOWN_AS}, n=1, cutoff=0.6)
        hint = f" Did you mean {_KNOWN_AS.get(close[0], close[0])}?" if close else ""
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, or package.module:Class of your own, "
            f"got {name!r}.{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method: cannot import {name!r}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"method: {name!r} must be a subclass of nsru_train.methods.Method.")
    return found


def check_records(
    methods: Iterable[Method], forget: Sequence[QA], retain: Sequence[QA], written: bool = False
) -> None:
    """Say, once, which fields records lack that the methods would read, and what stands in.

    Args:
        written: alternatives are going to be written for the records that bring none.

    Raises:
        ValueError: there are too few of them for a method.
    """
    if written:
        forget = [replace(qa, alternatives=qa.alternatives or ("To come.",)) for qa in forget]
    for method in methods:
        method.check_records(forget, retain)
        if text := method.lacks(forget):
            say_once(text)


def run_name(method: str, project: bool) -> str:
    """The name of a run in results and reports: NSRU without its projection is "lora"."""
    if method == "nsru":
        return "nsru" if project else "lora"
    return method.rpartition(":")[2] + (" projected" if project else "")


def method_of_run(name: str) -> tuple[str, bool]:
    """The method in a `run_name`, and whether it is projected."""
    if name in ("nsru", "lora"):
        return "nsru", name == "nsru"
    return name.removesuffix(" projected"), name.endswith(" projected")
