"""From measured rows to the plans that ``auto`` follows, and the walk of the GPU check."""

import csv
import dataclasses
import json
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from nsru_bench import (
    bench,
    correctness,
    gpu_bundle,
    gpu_check,
    internals,
    rows,
    winners,
)
from nsru_bench.session import Session
from nsru_bench.winners import (
    fold_entries,
    linear_entries,
    plan_table,
    whole_entries,
)
from nsru_kernels.dispatch import plans
from nsru_kernels.ops.linear import reference

ROOT = Path(__file__).parents[1]


def row(provider, which, ms, m=8192, **more):
    sizes = {"M": m, "K": 4096, "N": 4096, "R": 16}
    run = {"device": "A GPU", "torch": "2", "triton": "3", "commit": "c"}
    run |= {"dtype": "bfloat16", "tiny": "False", "Q": "256", "timing": "graph"}
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


def test_a_plan_on_a_gpu_must_win_by_two_percent():
    tile = "128x256x64_2x1_cooperative/2"
    for ours, backward, winner in (
        (0.97, 0.97, (f"cuda kext {tile}", f"cuda kext {tile}")),
        (0.99, 0.985, ("eager", "eager")),
    ):
        rows = [row("plan eager", which, 1.0) for which in ("forward", "backward")]
        rows += [row(f"plan cuda kext {tile}", "forward", ours)]
        rows += [row(f"plan cuda kext {tile}", "backward", backward)]
        (entry,) = linear_entries(rows)
        assert (entry["forward"], entry["backward"]) == winner
    rows = [row("plan eager", which, 1.0) for which in ("forward", "backward")]
    rows += [row("plan eager expand_first", which, 0.9) for which in ("forward", "backward")]
    rows += [row("plan triton expand_first", which, 0.8) for which in ("backward",)]
    (entry,) = linear_entries(rows)
    assert (entry["forward"], entry["backward"]) == ("eager expand_first", "triton expand_first")


def fold_rows(**ms):
    return [
        {
            "basis": basis,
            "adapters": "224",
            "provider": f"{backend}, {how}",
            "p50_ms": str(value),
        }
        for backend, values in ({"eager": (1.0, 1.0)} | ms).items()
        for basis, value in zip(
            ("float32",) if backend == "cpu" else ("float32", "bfloat16"), values, strict=True
        )
        for how in ("a loop" if backend == "eager" else "one launch",)
    ]


def test_the_grouped_fold_must_win_for_every_basis():
    for ms, winner in (
        ({"triton": (0.5, 0.4)}, "triton"),
        ({"triton": (0.5, 2.0)}, "eager"),
        ({"triton": (0.97, 0.97)}, "triton"),
        ({"triton": (0.5, 0.99)}, "eager"),
        ({"cpu": (0.9,)}, "cpu"),
        ({"cpu": (0.97,)}, "eager"),
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


def test_a_shape_whose_backward_was_cut_off_has_no_entry():
    cut = [row("plan eager", "forward", 1.0, m=64), row("plan triton kext", "forward", 0.9, m=64)]
    assert linear_entries([*ROWS, *cut]) == linear_entries(ROWS)


def write(folder, rows, op="linear"):
    with (folder / f"{op}.csv").open("w", newline="") as file:
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


def on_cpu(eager, cpu, m=512, **more):
    """Rows of one shape; forward alone says the opposite of what decides."""
    more = {"timing": "clock", "threads": 2, "device": "A CPU", "m": m, **more}
    return [
        row(f"plan {backend}", which, ms if which == "forward+backward" else 1 / ms, **more)
        for which in ("forward", "forward+backward")
        for backend, ms in (("eager", eager), ("cpu", cpu))
    ]


GROUP = {"N": 6144, "R": 48, "widths": "4096+1024+1024"}


def test_siblings_are_looked_up_by_sums():
    rows = [row("plan eager", "forward", 2.0, **GROUP), row("plan triton", "forward", 1.0, **GROUP)]
    rows += [r | {"pass": "backward"} for r in rows[:1]]
    assert linear_entries(rows) == [
        {"sizes": [8192, 4096, 6144, 48], "forward": "triton", "backward": "eager"}
    ]


def test_a_kernel_on_a_cpu_must_win_clearly():
    assert whole_entries(on_cpu(1.04, 1.0)) == []
    assert len(whole_entries(on_cpu(1.06, 1.0))) == 1


def test_the_shipped_table_is_that_of_the_committed_rows():
    shipped = json.loads((plans.FOLDER / "cpu-with-amx.json").read_text())
    assert shipped == plan_table(ROOT / "benchmarks/results/cpu")


def test_the_table_of_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(winners, "FOLDER", tmp_path)
    monkeypatch.setattr(plans, "FOLDER", tmp_path)
    rows = [*on_cpu(1.1, 1.0), *on_cpu(1.0, 1.1, m=128), *on_cpu(1.0, 1.1, m=64)]
    write(tmp_path, rows)
    write(tmp_path, on_cpu(2.0, 1.0, **GROUP), "siblings")
    write(tmp_path, [rows[0] | r for r in fold_rows(cpu=(0.5,))], "fold")
    winners.main([str(tmp_path)])
    path = tmp_path / "cpu-with-amx.json"
    assert str(path) in capsys.readouterr().out
    read = plans._table.__wrapped__(plans.CPU_WITH_AMX)
    assert read == {
        # At M=64 nothing is what an entry would say; M=256 is as near to 128 as to 512.
        "linear": [
            {"sizes": [128, 4096, 4096, 16], "forward": "eager", "backward": "eager"},
            {"sizes": [512, 4096, 4096, 16], "forward": "cpu", "backward": "cpu"},
        ],
        "linear_group": [{"sizes": [512, 4096, 6144, 48], "forward": "cpu", "backward": "cpu"}],
        "fold": [{"sizes": [224], "fold_many": "cpu"}],
        "threads": 2,
    }


def test_a_fold_of_another_run_makes_no_table(tmp_path):
    rows = on_cpu(2.0, 1.0)
    write(tmp_path, rows)
    other_run = rows[0] | {"commit": "older"}
    write(tmp_path, [other_run | r for r in fold_rows(cpu=(0.5,))], "fold")
    with pytest.raises(ValueError, match="one run"):
        plan_table(tmp_path)


def test_siblings_alone_make_a_table(tmp_path):
    write(tmp_path, on_cpu(2.0, 1.0, **GROUP), "siblings")
    table = plan_table(tmp_path)
    assert table["linear"] == []
    assert len(table["linear_group"]) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([r for r in on_cpu(2.0, 1.0) if r["provider"] == "plan eager"], "no times of the CPU"),
        ([*on_cpu(2.0, 1.0), *on_cpu(2.0, 1.0, m=1, threads=4)], "one run"),
    ],
)
def test_a_cpu_that_cannot_tell_leaves_the_table_alone(tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(winners, "FOLDER", tmp_path)
    write(tmp_path, rows)
    with pytest.raises(SystemExit, match=message):
        winners.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["linear.csv"]


def test_the_check_writes_the_table_of_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(winners, "FOLDER", tmp_path / "plans")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    winners.FOLDER.mkdir()
    check = gpu_check.Check(tmp_path / "out", 60, dry=False)
    gpu_check.write_plans(check)
    assert check.failed
    assert not list(winners.FOLDER.iterdir())
    write(check.out, ROWS)
    write(check.out, [ROWS[1] | GROUP, ROWS[4] | GROUP], "siblings")
    gpu_check.write_plans(check)
    (path,) = winners.FOLDER.iterdir()
    assert path.name == "a-gpu.json"
    assert "written to plans/a-gpu.json" in check.lines[-1]
    assert path.read_text() == (check.out / "plans.json").read_text()
    monkeypatch.setattr(plans, "FOLDER", winners.FOLDER)
    table = plans._table.__wrapped__("A GPU")
    assert {op: len(entries) for op, entries in table.items() if op != "threads"} == {
        "linear": 2, "linear_group": 1, "fold": 0,
    }  # fmt: skip
    assert table["threads"] == 0


def held(check):
    """What the archive holds, by name."""
    with tarfile.open(check.archive) as archive:
        return {
            name.partition("/")[2]: archive.extractfile(name).read().decode()
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }


def test_a_walk_that_is_cut_after_any_phase_has_lost_nothing_before(tmp_path):
    check = gpu_check.Check(tmp_path / "results", 60, dry=True)
    done = []
    for name, code, state in (("first", "print(1)", "ok"), ("second", "1 / 0", "FAILED (1)")):
        passed = check.run(name, [sys.executable, "-S", "-c", code], 30)
        assert passed == (state == "ok")
        done.append(name)
        found = held(check)
        assert {f"{phase}.log" for phase in done} | {"summary.txt", "table.txt"} <= set(found)
        assert f"{state}, " in found["summary.txt"].splitlines()[-1]
    assert "ZeroDivisionError" in held(check)["second.log"]
    assert check.failed


def test_a_phase_out_of_time_ends_with_all_it_started(tmp_path):
    check = gpu_check.Check(tmp_path / "results", 60, dry=True)
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    parent = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-S", "-c", {child!r}])
print("started", flush=True)
time.sleep(60)
"""
    assert not check.run("slow", [sys.executable, "-S", "-c", parent], 1)
    assert "slow" in check.lines[-1]
    assert "out of time" in check.lines[-1]
    assert "started" in held(check)["slow.log"]
    time.sleep(2)
    assert not late.exists(), "a worker outlived its phase"


def test_the_phases_leave_room_for_one_more_run():
    seconds = sum(phase.seconds for phase in gpu_check.PHASES)
    assert seconds <= gpu_check.UNTIL_TESTS_S <= 330
    ops = [op for phase in gpu_check.PHASES for op in phase.ops]
    assert ops[0] == "correctness"
    assert set(ops) <= set(bench.ALL_OPS)
    assert set(gpu_check.PLANS_AFTER) <= {phase.name for phase in gpu_check.PHASES}
    late = gpu_check.Check.__new__(gpu_check.Check)
    late.started, late.lines, late.dry = time.monotonic() - 328, [], False
    late.note = lambda *line: late.lines.append(line)
    gpu_check.run_phase(late, gpu_check.PHASES[-1])
    assert "left before the tests" in late.lines[0][1]


def test_a_bundle_that_would_not_load_is_refused(tmp_path):
    module = tmp_path / "_cuda.cpython-312-x86_64-linux-gnu.so"
    module.write_bytes(b"..GLIBC_2.2.5..GLIBC_2.34..GLIBC_2.36..")
    gpu_bundle.check_extension(module)
    module.write_bytes(b"..GLIBC_2.4..GLIBC_2.38..")
    with pytest.raises(ValueError, match=r"asks for glibc 2\.38, newer than 2\.36"):
        gpu_bundle.check_extension(module)
    with pytest.raises(ValueError, match="must be for cpython-312"):
        gpu_bundle.check_extension(module.rename(tmp_path / "_cuda.cpython-311-x86_64.so"))


def test_a_wrong_plan_is_dropped_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    session = Session(torch.device("cpu"), torch.float32, tiny=True, rounds=1, out=tmp_path)
    made = []

    def plans(operands):
        made.append(operands)
        right = internals.one_plan(operands, reference, "eager")
        off = dataclasses.replace(right, forward=lambda x: [1.01 * y for y in right.forward(x)])
        other = [0.0]

        def drifting(x):
            other[0] += 1e-7
            return [y + other[0] for y in right.forward(x)]

        return {
            "eager off": off,
            "eager drifting": dataclasses.replace(right, forward=drifting),
            "eager": right,
        }

    monkeypatch.setattr(internals, "every_plan", plans)
    correctness.run(session)
    assert correctness.dropped(tmp_path) == {"eager off", "eager drifting"}
    assert "two runs differ" in capsys.readouterr().out
    assert len(session.failed) == 2
    assert correctness.dropped(tmp_path / "elsewhere") == set()


def test_the_check_names_tests_that_exist():
    for named in (*gpu_check.SMALL, *gpu_check.SANITIZED):
        path, _, test = named.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), named


def test_the_summary_shows_siblings(tmp_path):
    shown = row("nsru", "forward", 1.0, **GROUP, plan="", ratio="1.09", base="frozen")
    write(tmp_path, [shown], "siblings")
    shown = " ".join(gpu_check.table(tmp_path).split())
    assert shown == "siblings forward 8192 4096 6144 48 nsru 1.0000 ms 1.090 × frozen"


def test_rows_of_another_commit_or_gpu_start_a_file_anew(tmp_path):
    """A file appended to after a fix must still make a plan table, and lose nothing."""
    for commit, device in (("c", "A GPU"), ("d", "A GPU"), ("d", "B"), ("c", "A GPU"), ("d", "B")):
        measured = [r | {"commit": commit, "device": device} for r in ROWS]
        rows.append(tmp_path / "linear.csv", measured)
        table = plan_table(tmp_path)
        assert (table["commit"], table["device"]) == (commit, device)
    rows.append(tmp_path / "linear.csv", measured)  # the same again is one run
    kept = {p.name: len(rows.read(p)) // len(ROWS) for p in tmp_path.iterdir()}
    assert kept == {
        "linear.csv": 2, "linear-c-A-GPU.csv": 2, "linear-d-A-GPU.csv": 1, "linear-d-B.csv": 1
    }  # fmt: skip


def test_the_commit_is_told_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == "unknown"
    monkeypatch.setenv("NSRU_COMMIT", "1a2b3c")
    assert rows.commit() == "1a2b3c"
