"""Fixtures of the tests of siblings."""

import pytest

from nsru_kernels.nn import siblings as module_under_test


@pytest.fixture
def groups(monkeypatch):
    """How many linears each call of the group op took."""
    sizes = []
    run = module_under_test.projected_linear_group

    def counted(x, weights, *args):
        sizes.append(len(weights))
        return run(x, weights, *args)

    monkeypatch.setattr(module_under_test, "projected_linear_group", counted)
    return sizes


@pytest.fixture(autouse=True)
def nothing_is_left():
    module_under_test._slot.pending = None
    yield
    pending = module_under_test._slot.pending
    assert pending is None or not pending.outputs or pending.x() is not None
