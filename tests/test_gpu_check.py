"""From measured rows to the plans that ``auto`` follows, and the walk of the GPU check."""

import csv
from pathlib import Path

import pytest

from nsru_bench.winners import fold_entries, linear_entries, plan_table

ROOT = Path(__file__).parents[1]


def row(provider, which, ms, m=8192, **more):
    sizes = {"M": m, "K": 4096, "N": 4096, "R": 16}
    run = {"device": "A GPU", "torch": "2", "triton": "3", "commit": "c"}
    run |= {"dtype": "bfloat16", "tiny": "False", "Q": "256"}
    values = {"provider": provider, "pass": which, "p50_ms": ms, **sizes, **run, **more}
    return {name: str(value) for name, value in values.items()}


ROWS = [
    row("frozen", "forward", 1.0),
    row("plan eager", "forward", 1.14),
    row("plan triton kext", "forward", 1.06),
    row("plan triton expand_first", "forward", 1.05),
    row("plan eager", "backward", 1.1),
    row("plan triton kext", "backward", 1.2),
    row("plan eager", "forward", 3.0, m=1),
    row("plan triton decode", "forward", 2.0, m=1),
    row("plan eager", "backward", 3.0, m=1),
    row("plan triton decode", "backward", 2.5, m=1),
]


def test_the_fastest_plan_wins_forward_and_the_fastest_backend_backward():
    assert linear_entries(ROWS) == [
        {"sizes": [1, 4096, 4096, 16], "forward": "triton decode", "backward": "triton"},
        {"sizes": [8192, 4096, 4096, 16], "forward": "triton expand_first", "backward": "eager"},
    ]


@pytest.mark.parametrize(("bf16_ms", "winner"), [(0.4, "triton"), (2.0, "eager")])
def test_the_grouped_fold_must_win_for_every_basis(bf16_ms, winner):
    rows = [
        {"basis": basis, "provider": provider, "p50_ms": str(ms)}
        for basis, provider, ms in (
            ("float32", "eager, a loop", 1.0),
            ("float32", "triton, one launch", 0.5),
            ("bfloat16", "eager, a loop", 1.0),
            ("bfloat16", "triton, one launch", bf16_ms),
        )
    ]
    assert fold_entries(rows) == [{"sizes": [], "fold_many": winner}]
    assert fold_entries([]) == []


def test_a_shape_whose_backward_was_cut_off_has_no_entry():
    cut = [row("plan eager", "forward", 1.0, m=64), row("plan triton kext", "forward", 0.9, m=64)]
    assert linear_entries([*ROWS, *cut]) == linear_entries(ROWS)


def write(folder, rows):
    with (folder / "linear.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_table_says_where_it_comes_from(tmp_path):
    write(tmp_path, ROWS)
    table = plan_table(tmp_path)
    assert (table["device"], table["commit"]) == ("A GPU", "c")
    assert len(table["linear"]) == 2
    assert table["fold"] == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"tiny": "True"}, "tiny sizes"),
        ({"device": "Another GPU"}, "one run"),
        ({"dtype": "float16"}, "one run"),
    ],
)
def test_rows_that_measure_nothing_make_no_table(tmp_path, spoil, message):
    write(tmp_path, [ROWS[0] | spoil, *(r | (spoil if "tiny" in spoil else {}) for r in ROWS)])
    with pytest.raises(ValueError, match=message):
        plan_table(tmp_path)
    (tmp_path / "linear.csv").unlink()
    with pytest.raises(ValueError, match="one run"):
        plan_table(tmp_path)
