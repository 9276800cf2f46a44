"""What mkdocs does beside reading docs/: links to the repository, the pages that code writes.

A page here links to files of the repository as they stand, so that the links work where the source
is read; such a file becomes a page or an image of the site, under its own path.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)((?:#[^)\s]*)?\))")
RESULTS = {  # folder → what it compares, with what sizes
    "smollm2": "SmolLM2-135M, two of twelve TOFU authors",
    "tofu-cpu": "a Llama of 5.8M parameters, two of forty TOFU authors, NPO at 0.05",
    "tofu-cpu-defaults": "the same by the present defaults",
    "frontier-smollm2": "SmolLM2-135M, two of twelve TOFU authors, ten methods",
    "frontier-tofu-5.9m": "a Llama of 5.8M parameters, two of forty TOFU authors, twenty methods",
    "frontier-fictitious": "a Llama of 1.0M parameters, fictitious authors",
}


def in_repository(uri: str) -> str:
    """The path in the repository of a page or file of the site."""
    own = posixpath.join("docs", uri)
    return uri if (ROOT / uri).exists() and not (ROOT / own).exists() else own


def site_uri(path: str) -> str:
    """The page or file of the site that a path of the repository becomes."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def linked(path: str) -> Iterator[str]:
    """Paths in the repository that a Markdown file links to."""
    for _, target, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def outside(pages: list[str]) -> list[str]:
    """Files outside docs/ that pages link to, and that those link to."""
    found, waiting = [], list(pages)
    while waiting:
        for path in linked(waiting.pop()):
            own = path.startswith("docs/") or path == "README.md"
            if (ROOT / path).is_file() and not own and path not in found:
                found.append(path)
                waiting += [path] * path.endswith(".md")
    return found


def relinked(markdown: str, uri: str) -> str:
    """The text of a page with its links as they are between pages of the site."""
    here = posixpath.dirname(in_repository(uri))

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[2]))
        return match[1] + posixpath.relpath(site_uri(path), posixpath.dirname(uri)) + match[3]

    return LINK.sub(link, markdown)


def cli_reference() -> str:
    """A page of every command and option, from the parser itself."""
    from jsonargparse import ArgumentParser, auto_parser

    from nsru_train.commands import COMMANDS
    from nsru_train.methods import METHODS

    own = {name: command for name, command in COMMANDS.items() if name != "bench"}
    parser = auto_parser(own)
    parts = [
        "# Command line\n",
        "Every option is a flag and a YAML key: `nsru train --config FILE`; `--print_config` shows "
        "them all. `nsru bench --help` lists what the benchmarks take.\n",
    ]
    for name, command in parser._subcommands_action._name_parser_map.items():
        parts += [f"## nsru {name}\n", f"{command.description or ''}\n", *_options(command)]
    parts += ["## Settings of other methods\n", "Of `nsru train --method NAME`.\n"]
    for name, method in METHODS.items():
        settings = ArgumentParser()
        settings.add_class_arguments(method, "objective")
        parts += [f"### {name}\n", *_options(settings)] if name != "nsru" else []
    return "\n".join(parts) + "\n"


def _options(parser: Any) -> Iterator[str]:
    rows = []
    for action in parser._actions:
        words = [w for w in action.option_strings or [action.dest] if w != "-h"]
        section = type(action).__name__ == "_ActionConfigLoad"  # its settings follow
        if section or action.dest in ("help", "config") or action.help == argparse.SUPPRESS:
            continue
        default = parser.get_defaults().get(action.dest)
        shown = "" if default is None or not action.option_strings else f"`{default}`"
        told = " ".join(str(action.help or "").split()).replace("|", "\\|")
        rows.append(f"| `{words[0]}` | {told.split(' (type: ')[0]} | {shown} |")
    if rows:
        yield from ("| option | | default |", "|---|---|---|", *rows, "")


def results() -> str:
    """A page of tables from the committed results."""
    parts = ["# Results\n", "Every table is made from the committed files that it names.\n"]
    for folder, what in RESULTS.items():
        path = ROOT / "benchmarks" / "results" / folder
        content = json.loads((path / "results.json").read_text(encoding="utf-8"))
        matched = content["matched"]
        before = {row["seed"]: row for row in content["methods"] if row["method"] == "before"}
        parts += [
            f"## {what[0].upper()}{what[1:]}\n",
            f"[{folder}](../benchmarks/results/{folder}/README.md), mean of the seeds. Lost is the "
            "probability of unseen retain answers, before minus after: at the end of a run, and at "
            f"equal forgetting (P forget {matched[0]['forget_prob']:.3f}, where a method got there "
            "with every seed).\n",
            "| method | seeds | P forget, end | P safe, end | lost, end | lost, equal forgetting |",
            "|---|---|---|---|---|---|",
        ]
        names = dict.fromkeys(row["method"] for row in content["methods"])
        for name in filter(lambda name: name != "before", names):
            rows = [row for row in content["methods"] if row["method"] == name]
            lost = [
                before.get(row["seed"], before[0])["retain_unseen_prob"] - row["retain_unseen_prob"]
                for row in rows
            ]
            equal = [row[f"{name}_damage"] for row in matched if f"{name}_damage" in row]
            parts.append(
                f"| {name} | {len(rows)} | {fmean(row['forget_prob'] for row in rows):.3f} "
                f"| {fmean(row['safe_prob'] for row in rows):.2f} | {fmean(lost):.4f} "
                f"| {f'{fmean(equal):.4f}' if len(equal) == len(rows) else ''} |"
            )
        parts += ["", f"![frontier](../benchmarks/results/{folder}/figures/frontier.png)\n"]
    return "\n".join(parts) + "\n"


GENERATED = {"reference/cli.md": cli_reference, "results.md": results}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the generated pages, and what pages link to outside docs/."""
    from mkdocs.structure.files import File

    pages = [in_repository(file.src_uri) for file in files if file.src_uri.endswith(".md")]
    made = {name: write() for name, write in GENERATED.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    pictures = [f"benchmarks/results/{folder}/figures/frontier.png" for folder in RESULTS]
    readmes = [f"benchmarks/results/{folder}/README.md" for folder in RESULTS]
    for path in dict.fromkeys([*pictures, *readmes, *outside([*pages, *readmes])]):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: links of the repository become those of the site."""
    return relinked(markdown, page.file.src_uri)
