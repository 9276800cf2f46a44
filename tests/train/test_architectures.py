"""Every family of docs/support.md goes from the estimate to a merge, and is described as it is."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from architectures import FAMILIES, PAGE, row, table, walk


@pytest.mark.parametrize("kind", FAMILIES)
def test_from_the_estimate_to_a_merge(kind, tmp_path):
    said = table(PAGE.read_text(encoding="utf-8"))
    assert row(kind, walk(kind, tmp_path)) == said[kind], "python tests/train/architectures.py"


def test_no_family_is_said_to_work_that_is_not_walked():
    assert list(table(PAGE.read_text(encoding="utf-8"))) == list(FAMILIES)
