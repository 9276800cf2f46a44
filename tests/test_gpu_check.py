"""From measured rows to the plans that ``auto`` follows, and the walk of the GPU check."""

import csv
from pathlib import Path

import pytest

from nsru_bench.winners import fold_entries, linear_entries, plan_table, sketch_entries

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


def fold_rows(**ms):
    return [
        {
            "basis": basis,
            "adapters": "224",
            "provider": f"{backend}, {how}",
            "p50_ms": str(value),
        }
        for backend, values in ({"eager": (1.0, 1.0)} | ms).items()
        for basis, value in zip(("float32", "bfloat16"), values, strict=True)
        for how in ("a loop" if backend == "eager" else "one launch",)
    ]


def test_the_grouped_fold_must_win_for_every_basis():
    for ms, winner in (
        ({"triton": (0.5, 0.4)}, "triton"),
        ({"triton": (0.5, 2.0)}, "eager"),
        ({"triton": (0.5, 0.4), "cuda": (0.4, 0.4)}, "cuda"),
        ({"triton": (0.5, 0.4), "cuda": (0.1, 1.1)}, "triton"),
        ({}, "eager"),
    ):
        assert fold_entries(fold_rows(**ms)) == [{"sizes": [224], "fold_many": winner}], ms
    one = [row | {"adapters": "1"} for row in fold_rows(triton=(2.0, 2.0))]
    assert fold_entries([*fold_rows(triton=(0.5, 0.4)), *one]) == [
        {"sizes": [1], "fold_many": "eager"},
        {"sizes": [224], "fold_many": "triton"},
    ]
    cut = [row for row in one if row["basis"] == "float32"]
    assert fold_entries([*fold_rows(), *cut]) == [{"sizes": [224], "fold_many": "eager"}]
    alone = [row for row in one if not row["provider"].startswith("eager")]
    assert fold_entries([*fold_rows(), *alone]) == [{"sizes": [224], "fold_many": "eager"}]
    assert fold_entries([]) == []


def test_the_fastest_sketch_of_each_width_wins():
    rows = [
        {"pass": which, "provider": provider, "M": "8192", "K": "4096", "L": width, "p50_ms": ms}
        for which, provider, width, ms in (
            ("update", "plan eager", "64", "3"),
            ("update", "plan triton one_read", "64", "2"),
            ("update", "plan cuda", "64", "1"),
            ("update", "covariance", "64", "0.1"),
            ("finish", "plan eager", "64", "0.1"),
            ("update", "plan eager", "576", "1"),
            ("update", "plan triton two_reads", "576", "0.9"),
        )
    ]
    assert sketch_entries(rows) == [
        {"sizes": [8192, 4096, 64], "update_sketch": "cuda"},
        {"sizes": [8192, 4096, 576], "update_sketch": "triton two_reads"},
    ]


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
