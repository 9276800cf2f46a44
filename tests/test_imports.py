"""The files of a package import each other in one direction only."""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS, TRAIN = ROOT / "nsru_kernels", ROOT / "python" / "nsru_train"
# From low to high. A file belongs to the entry that names it, or else to that of its folder; one
# without any to the lowest.
LAYERS = (
    ("cached", "data", "demo", "language_models", "measure", "parsing", "run_folder", "shares"),
    ("demo.authors", "guard", "losses", "methods", "metrics", "prompt_classifier", "routed"),
    ("answering", "config", "eval_results", "scoring", "sources"),
    (
        "adapters",
        "callbacks",
        "demo.sets",
        "demo.smollm2",
        "demo.tiny_model",
        "evaluation",
        "harness",
        "loading",
        "membership",
        "muse",
        "ordinary",
        "resumable",
        "run_config",
        "unlearn_dataset",
        "updates",
    ),
    ("trainer",),
    ("alternatives", "own_texts"),
    ("estimating",),
    ("pipeline",),
    ("open_unlearning", "report", "verify"),
    ("compare", "repair"),
    ("attack",),
    ("demo.run", "eval_run", "train_run"),
    ("cli", "commands"),
)


def read_imports(folder):
    """Module -> modules of the same package that run when it is imported or used.

    Imports inside functions count, those for type checking alone do not. Importing a.b.c runs a
    and a.b first; that does not count for modules inside a or a.b, which run after it began.
    """
    files = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path
        for path in folder.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for module, path in files.items():
        home = module if path.stem == "__init__" else module.rpartition(".")[0]
        graph[module] = {
            name
            for target in find_targets(ast.parse(path.read_text(encoding="utf-8")), home, files)
            for name in accumulate(target.split("."), "{}.{}".format)
            if name in files and (name == target or not module.startswith(f"{name}."))
        } - {module}
    return graph


def find_targets(tree, home, files):
    """Names of the modules that the statements in a tree import; home is the file's package."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        above = home.split(".")[: len(home.split(".")) - tree.level + 1] if tree.level else []
        source = ".".join([*above, *([tree.module] if tree.module else [])])
        inside = (f"{source}.{alias.name}" for alias in tree.names)
        yield from (name if name in files else source for name in inside)
    for child in ast.iter_child_nodes(tree):
        yield from find_targets(child, home, files)


@pytest.mark.parametrize(
    "folder",
    [KERNELS, TRAIN],
    ids=["nsru_kernels", "nsru_train"],
)
def test_no_circles(folder):
    try:
        TopologicalSorter(read_imports(folder)).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_nothing_imports_upward():
    ranks = {f"nsru_train.{name}": rank for rank, names in enumerate(LAYERS) for name in names}

    def rank(module):
        while module and module not in ranks:
            module = module.rpartition(".")[0]
        return ranks.get(module, 0)

    assert not [
        f"{module} imports {target}"
        for module, targets in read_imports(TRAIN).items()
        for target in targets
        if rank(target) > rank(module)
    ]


def test_every_way_to_import_is_seen(tmp_path):
    sources = {
        "__init__": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import made.low",
        "low": "import torch\ndef late():\n    from made.folder import high",
        "folder/__init__": "from .high import name",
        "folder/high": "from made import low, other\nfrom made.low import late\nfrom . import deep",
        "folder/deep": "import made.low as low",
    }
    for name, text in sources.items():
        path = tmp_path / "made" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert read_imports(tmp_path / "made") == {
        "made": set(),
        "made.low": {"made.folder", "made.folder.high"},
        "made.folder": {"made.folder.high"},
        "made.folder.high": {"made", "made.low", "made.folder.deep"},
        "made.folder.deep": {"made.low"},
    }
