"""Fixtures of the tests of groups."""

import pytest

from nsru_kernels.nn import group as module_under_test
from nsru_kernels.ops.linear import few


@pytest.fixture(autouse=True)
def not_few(monkeypatch):
    """Groups are for more tokens than these tests have; for few, members work one by one."""
    monkeypatch.setattr(few, "MOST", {})


@pytest.fixture
def groups(monkeypatch):
    """How many linears each call of the op took, where it took several."""
    sizes = []
    run = module_under_test.projected_linears

    def counted(x, weights, *args):
        if len(weights) > 1:
            sizes.append(len(weights))
        return run(x, weights, *args)

    monkeypatch.setattr(module_under_test, "projected_linears", counted)
    return sizes


@pytest.fixture(autouse=True)
def nothing_is_left():
    module_under_test._slot.waiting = None
    yield
    waiting = module_under_test._slot.waiting
    assert waiting is None or not waiting.outputs or waiting.x() is not None
