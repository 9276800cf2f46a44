"""A run's config.yaml: its sections as settings, and whether a run goes on with the same ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from nsru_kernels.files import read_json
from nsru_kernels.hf.peft_format import CONFIG
from nsru_train.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    Objective,
    SubspaceConfig,
    TrainConfig,
)
from nsru_train.methods import find_method
from nsru_train.parsing import explain_value, read_yaml

logger = logging.getLogger(__name__)

SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "subspace": SubspaceConfig,
    "lora": LoraConfig,
    "objective": Objective,
    "train": TrainConfig,
}

# Settings of DataConfig that say how questions are asked and answers judged.
_ASKING = ("system_prompt", "chat_template_kwargs", "safe_targets", "max_length")


def run_sections(
    run: str, model: ModelConfig | None, data: DataConfig | None, *, need_data: bool = True
) -> tuple[Any, Any]:
    """Model and data of a run: as given, else from its config.yaml.

    Data that are given without saying how to ask are asked as in the run, which is said.
    """
    path = Path(run) / "config.yaml"
    if (model is None or (data is None and need_data)) and not Path(run).is_dir():
        raise ValueError(f"run: no folder {run}; give the --out of nsru train.")
    saved = _read(path)
    if model is None:
        if "model" not in saved:
            what = f"{path} does not say the model"
            if not path.is_file():
                what = f"{run} has no config.yaml, which nsru train writes"
            raise ValueError(f"run: {what}; give --model.path.")
        model = _section("model", saved["model"], path)
        _say_trusted(model, path)
    if data is None and need_data:
        if "data" not in saved:
            raise ValueError(
                f"run: {path} does not say the data; give --data.forget and --data.retain."
            )
        data = _section("data", saved["data"], path)
    elif data is not None and "data" in saved:
        data = _asked_alike(data, _section("data", saved["data"], path))
    return model, data


def _asked_alike(data: DataConfig, of_run: DataConfig) -> DataConfig:
    """``data`` with the run's way to ask, where nothing was said of it."""
    defaults = DataConfig(data.forget, data.retain)
    alike = {
        name: value
        for name in _ASKING
        if getattr(data, name) == getattr(defaults, name) != (value := getattr(of_run, name))
    }
    if alike:
        told = ", ".join(f"{name} {value!r}" for name, value in alike.items())
        logger.warning(
            "data: as in the run, %s; give another by --data, '' for no system prompt.", told
        )
    alike.setdefault("system_prompt", data.system_prompt or None)
    return replace(data, **alike)


def saved_sections(run: str) -> dict[str, Any]:
    """The sections that ``nsru train`` wrote into a run's config.yaml, each as its settings.

    Raises:
        ValueError: no such folder, or sections are missing, odd, or of an unknown method.
    """
    path = Path(run) / "config.yaml"
    if not Path(run).is_dir():
        raise ValueError(f"run: no folder {run}; give the --out of nsru train.")
    saved = _read(path)
    if missing := [name for name in SECTIONS if name not in saved]:
        raise ValueError(f"run: {path} does not say {missing[0]}; give the --out of nsru train.")
    method = saved.get("method", "nsru")
    if ":" in str(method):  # said before it is imported
        logger.warning(
            "method: the code of %s is run, for %s names it. Where that is somebody else's, look "
            "at it first.",
            *(method, path),
        )
    sections = {name: _section(name, saved[name], path, method) for name in SECTIONS}
    _say_trusted(sections["model"], path)
    return sections


def _say_trusted(model: ModelConfig, path: Path) -> None:
    if model.trust_remote_code:
        logger.warning(
            "model: code that comes with %s is run, for %s says trust_remote_code. Where that is "
            "somebody else's, look at it first.",
            *(model.path, path),
        )


def say_changed_sets(run: str, digests: Mapping[str, str]) -> None:
    """Warn of sets that hold other records than when the run was made, where its results tell."""
    try:
        before = read_json(Path(run) / "results.json")["setup"]["sets"]
        changed = [name for name, now in digests.items() if before.get(name, now) != now]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # an unfinished run, or one of a version that did not keep them
    if changed:
        logger.warning(
            "run: %s changed since %s was made: what is scored now is not what it was trained on.",
            *(" and ".join(changed), run),
        )


def adapter_digest(folder: str | Path) -> str:
    """Of an adapter's tensors and settings, but for the name of its base: 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    config = Path(folder, CONFIG)
    settings = read_json(config) if config.is_file() else {}
    settings.pop("base_model_name_or_path", None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def is_own_adapter(run: str, adapter: str) -> bool:
    """True for the folder of the adapter that the run itself saved."""
    return Path(adapter).resolve() == Path(run, "adapter").resolve()


def folder_of(run: str, adapter: str | None, name: str) -> str:
    """The run's folder ``name``, with the adapter's own name behind it where it is another one."""
    if adapter is None or is_own_adapter(run, adapter):
        return f"{run}/{name}"
    path = Path(adapter).resolve()
    return f"{run}/{name}-{path.parent.name if path.name == 'adapter' else path.name}"


def changed_adapter(run: str, adapter: str | None) -> str | None:
    """The fault of a run's own adapter that is not the one it saved; None where it is."""
    if adapter is None or not is_own_adapter(run, adapter):
        return None
    try:
        saved = read_json(Path(run) / "results.json")["setup"]["adapter"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # an unfinished run, or one of a version that did not keep it
    if adapter_digest(adapter) == saved:
        return None
    return (
        f"{adapter} is not what the run saved, whose results are in {run}/results.json: tensors or "
        "settings were changed, or it is another run's"
    )


def say_changed_adapter(run: str, adapter: str | None) -> None:
    """Warn of ``changed_adapter``."""
    if changed := changed_adapter(run, adapter):
        logger.warning("run: %s.", changed)


def _read(path: Path) -> dict[str, Any]:
    """A run's config.yaml, empty where there is none."""
    saved = read_yaml(path) if path.is_file() else {}
    if not isinstance(saved, dict):
        raise ValueError(f"{path} must hold sections such as model and data, got {saved!r:.60}.")
    return saved


def _section(name: str, values: Any, path: Path, method: str = "nsru") -> Any:
    """The settings of one section of a run's config.yaml, each of its type."""
    from jsonargparse import ArgumentError, ArgumentParser

    settings = find_method(method) if name == "objective" else SECTIONS[name]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings, name)
    try:
        typed = parser.parse_object({name: values})[name].as_dict()
        return settings(**{**values, **typed})  # the parser overlooks unknown empty sections
    except (ArgumentError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        hints = {f"{name}.{key}": hint for key, hint in get_type_hints(settings).items()}
        raise ValueError(
            f"{path}: {explain_value(text, hints) or text}; was it written by another version, or "
            "changed by hand?"
        ) from error


def _alike(before: Any, now: Any, folder: Path) -> bool:
    """True where a setting is what it was; a path within the run's folder moves with it."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(
            _alike(before[name], value, folder) for name, value in now.items()
        )
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    path, folder = Path(now).resolve(), folder.resolve()
    inside = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return bool(inside) and Path(before).parts[-len(inside) :] == inside


def keep_date(path: Path, data: DataConfig) -> None:
    """Give data the date that the prompts of the run in ``path`` have, where it says none."""
    before = _read(path).get("data")
    given = before.get("chat_template_kwargs") if isinstance(before, dict) else None
    for name, value in given.items() if isinstance(given, dict) else ():
        if "date" in name:
            data.chat_template_kwargs = {name: value, **data.chat_template_kwargs}


def check_same_run(path: Path, config: Mapping[str, Any], growing: str = "") -> None:
    """A resumed run must go on as it began. Raises ValueError naming what differs.

    Args:
        growing: section that may have got more entries.
    """
    saved = _read(path) or config
    methods = [one.get("method", "nsru") for one in (saved, config)]  # there was no other once
    odd = [] if methods[0] == methods[1] else [f"method was {methods[0]} and is {methods[1]}"]
    for section, values in config.items() if not odd else ():
        if not isinstance(values, dict):
            continue
        before = saved.get(section)
        if section in SECTIONS:
            before = asdict(_section(section, before, path, methods[0]))
        before = before if isinstance(before, dict) else {}
        if section == growing:
            values = {name: value for name, value in values.items() if name in before}
        odd += [
            f"{section}.{name} was {before.get(name)!r} and is {value!r}"
            for name, value in values.items()
            if not _alike(before.get(name), value, path.parent)
        ]
    if odd:
        raise ValueError(
            f"resume: what is asked for differs from the run's {path}: {'; '.join(odd)}. Use the "
            "same settings, or another --out."
        )
