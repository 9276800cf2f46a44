"""What the tests of commands leave out because it takes long and is tested elsewhere."""

import functools

import pytest

from nsru_train import compare
from nsru_train.evaluation import evaluate


@pytest.fixture(scope="module")
def short_answers():
    """The demo's models have learnt next to nothing and do not find an end by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "evaluate", functools.partial(evaluate, max_new_tokens=12))
        yield


def leave_out_figures(patch):
    patch.setattr("nsru_train.report.page.draw", lambda folder, name, *_: f"<i>{name}</i>")


@pytest.fixture
def without_figures(monkeypatch):
    """Pages in this test have no drawings, which take seconds."""
    leave_out_figures(monkeypatch)


@pytest.fixture(scope="module")
def module_without_figures():
    """Nor have those in this module."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        yield
