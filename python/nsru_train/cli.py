"""The entry point ``nsru``: how the words of a command line are read."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import inspect
import io
import locale
import os
import re
import shlex
import sys
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safetensors import SafetensorError

from nsru_kernels import BackendUnavailable, __version__
from nsru_train.commands import COMMANDS, bench
from nsru_train.methods import Method, find_method
from nsru_train.open_unlearning.mapping import expand
from nsru_train.parsing import explain_value, in_words, read_yaml
from nsru_train.run_config import SECTIONS

# What transformers and peft call a setting that has a shorter name here.
KNOWN_AS = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "r": "rank",
    "lora_r": "rank",
    "target_modules": "targets",
    "model_name_or_path": "path",
    "output_dir": "out",
    "resume_from_checkpoint": "resume",
}
TOGETHER = ("train", "eval")  # what several processes do; all else one of them does
# By these a process knows that it has others beside it, and would wait for them.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WELCOME = """nsru makes a language model forget named knowledge, and keeps what it must keep.

nsru demo          begin here: the whole way on a small model, on this machine, in minutes
nsru train         unlearn your own, each line of a set {"question": "…", "answer": "…"}:
                   nsru train --model.path MODEL --data.forget FORGET.jsonl \\
                              --data.retain RETAIN.jsonl --train.lr 1e-3 --out runs/mine
                   (2e-4 for a model of billions of parameters)
nsru eval RUN      what it forgot and what it kept; then nsru merge RUN, nsru attack RUN
nsru env           what this machine has
nsru --help        all commands; nsru train --help: all options of one"""


def main(args: list[str] | None = None) -> None:
    """Entry point of ``nsru``: a user's mistake ends in one line, not in a traceback."""
    from jsonargparse import ArgumentError, auto_cli

    given = sys.argv[1:] if args is None else args
    if isinstance(sys.stdout, io.TextIOWrapper):
        if any(word.startswith("--print_config") for word in given):
            sys.stdout.reconfigure(encoding="utf-8")  # as --config reads it
        else:
            sys.stdout.reconfigure(errors="replace")  # a console may have no … or √
    if not given:
        print(WELCOME)
        return
    if given == ["--version"]:
        print(f"nsru-kernels {__version__}")
        return
    first = os.environ.get("RANK", "0") == "0"  # under torchrun
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _command(given) not in TOGETHER:
        if not first:
            return
        for name in LAUNCHED:
            os.environ.pop(name, None)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stdout if first else nowhere),
        ):
            if given[:1] == ["bench"]:  # has a parser of its own, which the script shares
                bench(given[1:])
            else:
                given = _underscored(expand(_with_config(given)))
                _check_configs(given)
                auto_cli(
                    {**COMMANDS, "train": _for_method(COMMANDS["train"], _settings(given))},
                    given,
                    prog="nsru",
                    description="Unlearning in the null space of what a model must keep.",
                    exit_on_error=False,
                    allow_abbrev=False,
                )
    except (ValueError, OSError, ArgumentError, SafetensorError, BackendUnavailable) as error:
        message = _explain(error, given) if isinstance(error, ArgumentError) else str(error)
        # The trainer, which is used without a command line as well, names its own argument.
        message = message.replace("resume_from_checkpoint=True", "--resume true")
        print(f"nsru: {message.replace('resume_from_checkpoint', '--resume')}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"\nnsru: interrupted. {_what_is_kept(given)}", file=sys.stderr)
        raise SystemExit(130) from None


def _what_is_kept(given: list[str]) -> str:
    """A line on what an interrupted command leaves behind, and how to go on."""
    from transformers.trainer_utils import get_last_checkpoint

    command = _command(given) or ""
    options = inspect.signature(COMMANDS[command]).parameters if command in COMMANDS else {}
    if "resume" not in options:
        drawn = " Where its results.json is there, `nsru report` draws what is missing."
        again = "Nothing half-written is left; the same command starts again."
        return again + drawn * (command in ("refresh", "rollback"))
    again = shlex.join(["nsru", *[word for word in given if not word.startswith("--resume")]])
    if command != "train":
        return f"What was finished is kept. To go on: {again} --resume=true"
    out = _asked(given, "out", options["out"].default)
    last = get_last_checkpoint(out) if os.path.isdir(out) else None
    if last is not None:
        return f"{last} is kept. To go on: {again} --resume=true"
    found = os.path.join(out, "subspaces")
    if os.path.isfile(os.path.join(found, "index.json")):
        again += f" --subspace.path={found}"
    return f"There is no checkpoint yet (train.save_steps). To start again: {again}"


def _with_config(given: list[str]) -> list[str]:
    """``nsru compare FILE`` is ``nsru compare --config FILE``."""
    if given[:1] != ["compare"] or len(given) < 2 or given[1].startswith("-"):
        return given
    if not os.path.isfile(given[1]):
        raise ValueError(f"compare: no file {given[1]}; give a YAML file, or options.")
    return [given[0], "--config", *given[1:]]


def _command(given: list[str]) -> str | None:
    return next((word for word in given if word in COMMANDS), None)


def _asked(given: list[str], option: str, default: str) -> str:
    """A value that is asked for, by its flag or a --config file: the last one counts."""
    found = default
    for name, value in re.findall(
        rf"^--({option}|config)(?:=|\n)(.*)", "\n".join(given), re.MULTILINE
    ):
        if name == "config":
            saved = read_yaml(value) if os.path.isfile(value) else None
            value = saved.get(option, found) if isinstance(saved, dict) else found
        found = value
    return str(found)


def _settings(given: list[str]) -> type[Method]:
    """Those of the method that is asked for."""
    return find_method(_asked(given, "method", "nsru"))


def _for_method(command: Any, settings: type[Method]) -> Any:
    """``command`` with the settings of a method as its objective."""

    def wrapped(**options: Any) -> None:
        command(**options)

    signature = inspect.signature(command)
    found: Any = wraps(command)(wrapped)
    found.__signature__ = signature.replace(
        parameters=[
            p.replace(annotation=settings, default=settings()) if p.name == "objective" else p
            for p in signature.parameters.values()
        ]
    )
    found.__annotations__ = {**command.__annotations__, "objective": settings}
    return found


def _check_configs(given: list[str]) -> None:
    """Raise ValueError where a --config file is not YAML, has a key twice, or an odd section.

    Also where jsonargparse, which reads as the locale says, would read others than its letters.
    """
    values = re.findall(r"--config(?:=|\n)(.*)", "\n".join(given))
    encoding = locale.getpreferredencoding(False)
    for path in filter(os.path.isfile, values):
        saved = read_yaml(path)
        if codecs.lookup(encoding).name != "utf-8" and not Path(path).read_bytes().isascii():
            raise ValueError(
                f"{path} is in UTF-8, and this locale would read it as {encoding}; set "
                "PYTHONUTF8=1."
            )
        if not isinstance(saved, dict):
            continue
        asked = _asked(given, "method", "nsru")
        own = saved.get("method", asked)
        if saved.get("objective") and own != asked and _command(given) == "train":
            raise ValueError(
                f"{path}: its objective is that of {own}, and {asked} is asked for: leave one out."
            )
        for name in SECTIONS:
            if not isinstance(saved.get(name), dict | str | None):
                raise ValueError(
                    f"{path}: {name}: expected {in_words(SECTIONS[name])}, got {saved[name]!r:.80}."
                )


def _explain(error: Exception, given: list[str]) -> str:
    """One line on what is wrong in the command line, with the closest option that there is."""
    text = " ".join(str(error).split())
    command = _command(given)
    # A section that may be left out, as those of eval: what is wrong stands inside.
    inside = re.search(r'key "(\w+)": .*class_path \S+: (.*) - Expected a <class \'NoneT', text)
    if inside is not None:
        text = re.sub(r'(key "|option \')', rf"\1{inside[1]}.", inside[2], flags=re.I)
        said, required, missing = text.partition("required: ")
        text = said + required + re.sub(r"(\w+)", rf"--{inside[1]}.\1", missing)
    # A value for a whole section, where one of its settings is meant.
    whole = re.search(r'key "(\w+)": - Expected a path but (.+?) either not accessible', text)
    if whole is not None and whole[1] in SECTIONS:
        name, value = whole.groups()
        first = fields(SECTIONS[name])[0].name
        return (
            f"--{name}: expected {in_words(SECTIONS[name])}, got {value}. "
            f"Did you mean --{name}.{first} {value}?"
        )
    unknown = re.search(
        r"unrecognized arguments: -*([\w.]+)|option '([\w.]+)'(?: is not accepted|$)", text, re.I
    )
    if command is None or unknown is None:
        options = {} if command is None else _options(command, _settings(given))
        names = re.sub(rf"\b{command}\.([a-z_]+\.)", r"--\1", text)
        if (odd := explain_value(text, options)) is not None:
            names = f"--{odd}"
        return f"{names}. `nsru {command or ''}{' ' * bool(command)}--help` lists all options."
    name = unknown[1] or unknown[2]
    section, _, last = name.rpartition(".")
    options = _options(command, _settings(given))
    asked = f"{section}.{KNOWN_AS[last]}".strip(".") if last in KNOWN_AS else name
    # By its last part too: --learning_rate is --train.lr.
    ends = {option.rpartition(".")[2]: option for option in reversed(options)}
    close = difflib.get_close_matches(asked, options, n=1, cutoff=0.8) or [
        ends[end] for end in difflib.get_close_matches(asked.rpartition(".")[2], ends, n=1)
    ]
    hint = f" Did you mean --{close[0]}?" if close else ""
    return f"{command} has no option {name!r}.{hint} `nsru {command} --help` lists all options."


def _options(command: str, method: type[Method]) -> dict[str, Any]:
    """Type hints of all options of a command by name, those of sections after the section's own."""
    sections = {**SECTIONS, "objective": method}
    options: dict[str, Any] = {}
    for name, hint in get_type_hints(COMMANDS[command]).items():
        options[name] = hint
        if name in SECTIONS and SECTIONS[name] in (hint, *get_args(hint)):
            own = get_type_hints(sections[name])
            options |= {f"{name}.{field.name}": own[field.name] for field in fields(sections[name])}
    options.pop("return", None)
    return options


def _underscored(args: list[str]) -> list[str]:
    """--data-dir means --data_dir, as in most command lines."""
    names = (arg.partition("=") for arg in args)
    return [
        name.replace("-", "_").replace("__", "--", 1) + equals + value
        if name.startswith("--")
        else name + equals + value
        for name, equals, value in names
    ]


if __name__ == "__main__":
    main()
