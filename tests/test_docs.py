"""The documents: their links, the options and code that they show, what is generated for them."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import docstring_parser
import pytest

import nsru_kernels as nk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@pytest.fixture(scope="module")
def reference():
    return site.cli_reference()


@every_page
def test_links_lead_somewhere(page):
    """To files of the repository, pages that code writes, and headings."""
    generated = {ROOT / "docs" / name for name in site.GENERATED}
    for _, target, anchor in site.LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists() or path in generated, target
        if anchor[:-1] and path.suffix == ".md" and path.exists():
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor[1:-1] in slugs, f"{target}{anchor}"


@every_page
def test_options_that_a_page_shows_exist(page, reference):
    known = set(re.findall(r"^\| `--([\w.]+)`", reference, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"--((?:model|data|subspace|lora|objective|train)\.\w+)", text)
    assert not set(shown) - known


@every_page
def test_code_that_a_page_shows_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(code)


def test_the_reference_has_every_command_and_section(reference):
    from nsru_train.commands import COMMANDS

    assert re.findall(r"^## nsru (\w+)$", reference, re.MULTILINE) == [*COMMANDS][:-1]
    assert "| `--train.lr` | peak learning rate of AdamW." in reference
    assert "`0.0005`" in reference


def test_messages_that_are_explained_are_said():
    folders = (ROOT / "nsru_kernels", ROOT / "python" / "nsru_train")
    files = (path for folder in folders for path in folder.rglob("*.py"))
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go over several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| (`.*?`) \|", page.split("| what you see")[0], re.MULTILINE)
    parts = [part.strip() for part in re.split("[`…]|, `", "".join(messages))]
    assert len(messages) >= 10
    assert not [part for part in parts if len(part) > 2 and part not in source]


def test_links_become_those_of_the_site():
    text = "[a](../../benchmarks/results/smollm2/README.md) [b](../concepts.md#x) [c](#here)"
    assert site.relinked(text, "howto/sizes.md") == (
        "[a](../benchmarks/results/smollm2/README.md) [b](../concepts.md#x) [c](#here)"
    )
    assert site.relinked("[a](../../../csrc/README.md)", "nsru_kernels/ops/linear/README.md") == (
        "[a](../../../csrc/README.md)"
    )
    assert "csrc/cpu/README.md" in site.outside(["docs/backends.md"])


def test_result_tables_are_those_of_the_files():
    page = site.results()
    assert "| nsru | 3 | 0.001 | 0.91 | 0.0035 | 0.0028 |" in page  # SmolLM2
    assert page.count("\n## ") == len(site.RESULTS)


@pytest.mark.parametrize("name", nk.__all__)
def test_public_names_say_what_they_take(name):
    found = getattr(nk, name)
    text = docstring_parser.parse(inspect.getdoc(found) or "")
    assert text.short_description
    if name in ("SwapReport", "BackendUnavailable"):  # not made by users
        return
    told = {p.arg_name for p in text.params} | {"device", "dtype"}
    assert not inspect.signature(found).parameters.keys() - told


@pytest.mark.parametrize("folder", ["nsru_kernels", "python"])
def test_docstrings_begin_with_what_a_thing_is(folder):
    questions = re.compile(r'"""(What|Whether|Which|How)\b')
    for path in sorted((ROOT / folder).rglob("*.py")):
        found = questions.findall(path.read_text(encoding="utf-8"))
        assert not found, path
