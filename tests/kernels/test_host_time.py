"""How much Python stands between ``forward`` and the kernel."""

import pytest

from nsru_bench.host_time import count_python_calls, make_input, make_providers


@pytest.mark.parametrize(
    ("provider", "layers", "most"),
    [("nsru alone", 1, 12), ("nsru alone", 3, 36), ("nsru group", 3, 40)],
)
def test_few_calls_stand_between_a_module_and_its_kernel(provider, layers, most):
    made, x = make_providers()[provider], make_input()
    made.forward(x)
    counts = count_python_calls(made.forward.layers[:layers], x)
    assert 0 < counts.own_calls <= most
    assert counts.own_deepest <= 8


def test_nothing_runs_in_a_frozen_linear():
    counts = count_python_calls(make_providers()["frozen"].forward.layers, make_input())
    assert counts.calls > 0
    assert counts.own_calls == counts.own_deepest == 0
