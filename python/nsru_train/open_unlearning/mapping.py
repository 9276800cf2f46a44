"""OpenUnlearning's configuration as settings of `nsru train`, which then runs without its code."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nsru_kernels.dispatch import default_device
from nsru_train.methods import METHODS
from nsru_train.sources import TOFU_REPO, load_records

FLAG = "--open-unlearning"
HANDLERS = {
    "GradAscent": "ga", "GradDiff": "graddiff", "NPO": "npo", "SimNPO": "simnpo", "DPO": "dpo",
    "RMU": "rmu", "UNDIAL": "undial", "WGA": "wga", "SatImp": "satimp", "CEU": "ceu", "PDU": "pdu",
}  # fmt: skip
# Their name of a method's setting → ours; the same where it is not here.
RENAMED = {
    "gamma": "w_forget", "alpha": "w_retain", "steering_coeff": "steering",
    "ignore_first_n_answer_tokens": "skip", "retain_loss_eps": "bound",
    "dual_step_size": "dual_lr", "dual_warmup_epochs": "dual_warmup",
}  # fmt: skip
RETAIN = {"NLL": "nll", "KL": "kl"}
# What has one form here: setting → the values that mean it.
FIXED: dict[str, tuple[Any, ...]] = {
    "primal_dual": (True,),
    "dual_update_upon": ("step",),
    "optim": ("paged_adamw_32bit", "adamw_torch", "adamw_torch_fused"),
    "anchor": ("forget",),
    "split": ("train",),
    "return_original": (True,),
    "mode": ("unlearn",),
}  # fmt: skip
# How a text without a chat template is written.
TAGS = {
    "user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: ",
    "asst_end_tag": "\n\n",
}  # fmt: skip
LOW_RATE = 2e-5  # or less: one of full fine-tuning, such as that of their experiments
READ = ("model", "data", "trainer", "mode", "holdout_split")  # of a configuration
# What changes nothing that is trained, or is said again elsewhere.
WITHOUT_EFFECT = {
    "model": {"model_args.attn_implementation", "model_args.device_map", "model_handler"},
    "args": {
        "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "logging_steps",
        "logging_dir", "output_dir", "ddp_find_unused_parameters", "save_only_model", "do_train",
        "do_eval", "eval_on_start", "eval_strategy", "eval_steps", "remove_unused_columns",
        "gradient_checkpointing_kwargs", "disable_tqdm",
    },
    "method": {"loss_names"},
    "top": {
        "collator", "eval", "paths", "hydra", "forget_split", "retain_split", "holdout_split",
        "retain_logs_path", "question_key", "task_name", "data_split",
    },
}  # fmt: skip


def expand(words: Sequence[str]) -> list[str]:
    """A command line in which --open-unlearning DIR and Hydra's overrides are flags of ours.

    What stands as a flag of ours already comes later, and so counts.

    Raises:
        ValueError: a setting has no counterpart, or the directory is no checkout.
    """
    found = list(words)
    names = [word.partition("=")[0].replace("_", "-") for word in found]
    if FLAG not in names:
        return found
    place = names.index(FLAG)
    repo = found[place].partition("=")[2] or "".join(found[place + 1 : place + 2])
    del found[place : place + (1 if "=" in found[place] else 2)]
    if found[:1] != ["train"]:
        raise ValueError(f"{FLAG} belongs to nsru train.")
    overrides = [
        word
        for before, word in itertools.pairwise(found)
        if not word.startswith("--")
        and ("=" in word or word.startswith("~"))
        and ("=" in before or not before.startswith("--"))
    ]
    rest = [word for word in found[1:] if word not in overrides]
    data_dir = _value_of(rest, "--data.data_dir")
    mapped = settings_of(compose(repo, overrides), data_dir)
    if _value_of(rest, "--method") is not None:
        del mapped["method"], mapped["objective"]  # they are of another
    if mapped["train"].get("lr", 1) <= LOW_RATE and _value_of(rest, "--train.lr") is None:
        print(
            f"train.lr: {mapped['train']['lr']:g} is a rate of full fine-tuning, at which adapters "
            "hardly move; 1e-4 to 5e-4 are usual (--train.lr)."
        )
    return ["train", *flags(mapped), *rest]


def _value_of(words: Sequence[str], flag: str) -> str | None:
    spelt = [word.replace("-", "_").replace("__", "--", 1) for word in words]
    for i, word in enumerate(spelt):
        if word.partition("=")[0] == flag:
            return words[i].partition("=")[2] or "".join(words[i + 1 : i + 2])
    return None


def flags(settings: Mapping[str, Any]) -> list[str]:
    """--section.name=value of every setting."""
    found = []
    for section, values in settings.items():
        for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            flag = f"--{section}.{name}".rstrip(".")
            found.append(f"{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def compose(repo: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of their program as plain values; its code is not imported."""
    root = Path(repo).resolve()
    if not (root / "configs" / "unlearn.yaml").is_file():
        raise ValueError(
            f"{FLAG}: {root} has no configs/unlearn.yaml; give a checkout of "
            "locuslab/open-unlearning."
        )
    try:
        import hydra
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise ValueError(f"{FLAG} needs hydra-core: pip install hydra-core") from error
    with hydra.initialize_config_dir(str(root / "configs"), version_base=None):
        try:
            config = hydra.compose("unlearn.yaml", list(overrides))
        except Exception as error:  # Hydra's and OmegaConf's, with what is wrong and where
            raise ValueError(f"{FLAG}: {error}") from error
    # Made of paths, which ask for a run of Hydra.
    config.trainer.args.output_dir = config.trainer.args.logging_dir = None
    read = {name for name in READ if name in config and not OmegaConf.is_missing(config, name)}
    return {str(name): _plain(config[name]) if name in read else None for name in config}


def _plain(value: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def settings_of(config: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Sections of `nsru train` that do what a composed configuration says.

    Args:
        data_dir: folder with TOFU's files, which are counted; None: the hub.

    Raises:
        ValueError: a setting has no counterpart; it is named.
    """
    refused: list[str] = []
    unknown = config.keys() - WITHOUT_EFFECT["top"] - {"model", "data", "trainer", "mode"}
    refused += [f"{name}: has no counterpart" for name in sorted(unknown)]
    _fixed("mode", config.get("mode", "unlearn"), "", refused)
    trainer = config["trainer"]
    method, objective = _method(trainer, refused)
    data = _data(config, refused)
    mapped: dict[str, Any] = {
        "model": _model(config["model"], data, refused),
        "data": data,
        "method": method,
        "objective": objective,
    }
    if not refused:  # the sets are read to count them
        mapped["train"] = _train(trainer["args"], data, data_dir, refused)
    if refused:
        raise ValueError(
            f"{FLAG}: {len(refused)} settings cannot be mapped: {'; '.join(refused)}. `python -m "
            "nsru_train.open_unlearning` runs their program itself."
        )
    return mapped


def _method(trainer: Mapping[str, Any], refused: list[str]) -> tuple[str, dict[str, Any]]:
    handler, given = trainer["handler"], dict(trainer.get("method_args") or {})
    if handler not in HANDLERS:
        refused.append(
            f"trainer.handler: {handler} is none of {', '.join(HANDLERS)} (take one of them, and "
            "give --method for another of nsru train)"
        )
        return "nsru", {}
    name = HANDLERS[handler]
    settings = METHODS[name]
    known = {field.name for field in fields(settings)}
    path = "trainer.method_args"
    mapped: dict[str, Any] = {}
    if name == "rmu":
        layer = re.fullmatch(r"model\\?\.layers\\?\.(\d+)", str(given.pop("module_regex", "")))
        if layer is None:
            refused.append(f"{path}.module_regex: must name one of model.layers")
        else:
            mapped["layer"] = int(layer[1])
            _rmu_weights(given.pop("trainable_params_regex", None), int(layer[1]), refused)
    for setting, value in given.items():
        ours = (
            "multiplier" if (name, setting) == ("pdu", "alpha") else RENAMED.get(setting, setting)
        )
        if setting in WITHOUT_EFFECT["method"]:
            continue
        if setting in FIXED:
            _fixed(setting, value, f"{path}.", refused)
        elif setting == "retain_loss_type":
            wanted = "EMBED_DIFF" if name == "rmu" else "NLL"
            if "retain" in known and value in RETAIN:
                mapped["retain"] = RETAIN[value]
            elif value != wanted:
                refused.append(f"{path}.{setting}: {name} has {wanted} alone, got {value}")
        elif ours in known:
            mapped[ours] = value
        else:
            refused.append(f"{path}.{setting}: {name} has no such setting")
    by_code = getattr(settings, "read_by_forget", name in ("rmu", "pdu"))
    if "compat" in known and (by_code or mapped.get("retain") == "kl"):
        mapped["compat"] = "open-unlearning"
    return name, mapped


def _rmu_weights(patterns: Sequence[str] | None, layer: int, refused: list[str]) -> None:
    """Here RMU trains the last linear of three layers' MLPs, as its authors' code does."""
    wanted = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(max(0, layer - 2), layer + 1)]
    others = [f"model.layers.{layer}.self_attn.q_proj.weight", "model.embed_tokens.weight"]
    hit = [
        [any(re.fullmatch(p, name) for p in patterns or ()) for name in names]
        for names in (wanted, others)
    ]
    if not all(hit[0]) or any(hit[1]):
        refused.append(
            "trainer.method_args.trainable_params_regex: RMU adapts the mlp.down_proj of layers "
            f"{max(0, layer - 2)} to {layer} alone"
        )


def _model(given: Mapping[str, Any], data: dict[str, Any], refused: list[str]) -> dict[str, Any]:
    arguments = dict(given["model_args"])
    path, dtype = arguments.pop("pretrained_model_name_or_path"), arguments.pop("torch_dtype", None)
    tokenizer = dict(given.get("tokenizer_args") or {})
    own = tokenizer.pop("pretrained_model_name_or_path", path)
    ignored = WITHOUT_EFFECT["model"]
    extra = [f"model.model_args.{n}" for n in arguments if f"model_args.{n}" not in ignored]
    extra += [f"model.tokenizer_args.{n}" for n in tokenizer]
    extra += [
        f"model.{n}"
        for n in given.keys() - {"model_args", "tokenizer_args", "template_args"} - ignored
    ]
    refused += [f"{name}: has no counterpart" for name in sorted(extra)]
    if given.get("model_handler", "AutoModelForCausalLM") != "AutoModelForCausalLM":
        refused.append(f"model.model_handler: {given['model_handler']} is not supported")
    _template(given.get("template_args") or {}, data, refused)
    half = dtype in ("bfloat16", "float16") and default_device().type == "cuda"
    return {
        "path": path,
        **({} if own == path else {"tokenizer": own}),
        "dtype": dtype if half else "float32",
    }


def _template(given: Mapping[str, Any], data: dict[str, Any], refused: list[str]) -> None:
    known = {"apply_chat_template", "system_prompt", "system_prompt_with_special_tokens",
             "date_string", *TAGS}  # fmt: skip
    refused += [
        f"model.template_args.{n}: has no counterpart" for n in sorted(given.keys() - known)
    ]
    if given.get("apply_chat_template", True):
        if given.get("system_prompt"):
            data["system_prompt"] = given["system_prompt"]
        if given.get("date_string") is not None:
            data["chat_template_kwargs"] = {"date_string": given["date_string"]}
        return
    if given.get("system_prompt_with_special_tokens"):
        refused.append(
            "model.template_args.system_prompt_with_special_tokens: needs a chat template"
        )
    odd = {name: given.get(name) for name, tag in TAGS.items() if given.get(name) != tag}
    if odd:
        refused.append(
            f"model.template_args: {odd} where a text without a chat template has {TAGS} (set the "
            "tokenizer's chat_template)"
        )


def _data(config: Mapping[str, Any], refused: list[str]) -> dict[str, Any]:
    given = dict(config["data"])
    _fixed("anchor", given.pop("anchor", "forget"), "data.", refused)
    mapped: dict[str, Any] = {}
    for name in ("forget", "retain"):
        sets = given.pop(name, None) or {}
        if len(sets) != 1:
            refused.append(f"data.{name}: must be one dataset, got {', '.join(sets) or 'none'}")
            continue
        [(label, settings)] = sets.items()
        _dataset(name, f"data.{name}.{label}", settings, mapped, refused)
    refused += [f"data.{name}: has no counterpart" for name, value in given.items() if value]
    if config.get("holdout_split"):
        mapped["more"] = {"holdout": f"tofu:{config['holdout_split']}"}
    return mapped


def _dataset(
    name: str, path: str, given: Mapping[str, Any], mapped: dict[str, Any], refused: list[str]
) -> None:
    handler, arguments = given["handler"], dict(given["args"])
    refused += [
        f"{path}.{n}: has no counterpart" for n in given.keys() - {"handler", "args", "access_key"}
    ]
    source = dict(arguments.pop("hf_args"))
    if handler not in ("QADataset", "QAwithIdkDataset"):
        refused.append(f"{path}.handler: {handler}, and nsru train has questions and answers alone")
        return
    if handler == "QAwithIdkDataset":
        mapped["safe_targets"] = arguments.pop("idk_path")
    repo, label = source.pop("path"), source.pop("name", None)
    files = source.pop("data_files", None)
    if repo == TOFU_REPO:
        mapped[name] = f"tofu:{label}"
    elif repo in ("json", "csv", "parquet") and isinstance(files, str):
        mapped[name] = files
    else:
        refused.append(f"{path}.args.hf_args.path: {repo} is neither {TOFU_REPO} nor a local file")
    for setting, value in {**source, **arguments}.items():
        ours = {"question_key": "question_column", "answer_key": "answer_column"}.get(
            setting, setting
        )
        if setting in FIXED:
            _fixed(setting, value, f"{path}.args.", refused)
        elif ours in ("question_column", "answer_column", "max_length"):
            if mapped.setdefault(ours, value) != value:
                refused.append(f"{path}.args.{setting}: is another in the other set")
        elif value is not None:
            refused.append(f"{path}.args.{setting}: has no counterpart")


def _train(
    given: Mapping[str, Any], data: Mapping[str, Any], data_dir: str | None, refused: list[str]
) -> dict[str, Any]:
    args = {k: v for k, v in given.items() if k not in WITHOUT_EFFECT["args"]}
    epochs = args.pop("num_train_epochs", 3)
    mapped: dict[str, Any] = {"batch_size": args.pop("per_device_train_batch_size", 8)}
    mapped["accumulate"] = args.pop("gradient_accumulation_steps", 1)
    columns = {k: v for k, v in data.items() if k.endswith("_column")}
    count = len(load_records(data["forget"], data_dir, ignore_unknown=True, **columns))
    batches = math.ceil(count / mapped["batch_size"])
    steps = args.pop("max_steps", -1)
    mapped["steps"] = steps if steps > 0 else math.ceil(epochs * batches / mapped["accumulate"])
    passes = mapped["steps"] * mapped["accumulate"] / batches
    warmups: dict[str, Callable[[float], float]] = {
        "warmup_epochs": lambda value: value / passes,
        "warmup_steps": lambda value: value / mapped["steps"],
        "warmup_ratio": lambda value: value,
    }
    found = [share(args.pop(n)) for n, share in warmups.items() if args.get(n)]
    mapped["warmup"] = min(1.0, found[0]) if found else 0.0
    for name in warmups:
        args.pop(name, None)
    saved = {"no": 0, "steps": args.pop("save_steps", 500)}
    strategy = args.pop("save_strategy", "no")
    mapped["save_steps"] = saved.get(strategy, 0)
    if strategy not in saved or not isinstance(mapped["save_steps"], int):
        refused.append("trainer.args.save_strategy: must be no, or steps with whole save_steps")
    mapped["bf16"] = bool(args.pop("bf16", False)) and default_device().type == "cuda"
    reports = args.pop("report_to", "none")
    mapped["report_to"] = [] if reports in (None, "none") else reports
    names = {"learning_rate": "lr"}
    same = {"weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "seed",
            "gradient_checkpointing"}  # fmt: skip
    for name, value in args.items():
        if name in FIXED:
            _fixed(name, value, "trainer.args.", refused)
        elif name in same or name in names:
            mapped[names.get(name, name)] = value
        else:
            refused.append(f"trainer.args.{name}: has no counterpart")
    return mapped


def _fixed(name: str, value: Any, path: str, refused: list[str]) -> None:
    if value not in FIXED[name]:
        refused.append(f"{path}{name}: must be {' or '.join(map(str, FIXED[name]))}, got {value}")
