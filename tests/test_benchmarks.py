"""Benchmarks walk through on a CPU: sane rows, pictures, and no figure for a wrong provider."""

import dataclasses
import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch

import nsru_kernels as nk
from nsru_bench import (
    bench,
    cases,
    host_time,
    internals,
    linear,
    loss,
    plots,
    providers,
    separation,
    siblings,
    sketch,
    sketch_methods,
)
from nsru_bench.rows import read
from nsru_bench.session import Session
from nsru_kernels.dispatch import cpu_extension

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")
PEAKS = {"chunked": 1001, "full logits": 1002}


def tiny_session(out, dtype=torch.float32):
    return Session(CPU, dtype, tiny=True, rounds=2, out=out)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder that a tiny run of some benchmarks leaves."""
    out = tmp_path_factory.mktemp("bench")
    session = tiny_session(out)
    with pytest.MonkeyPatch.context() as patch:  # a test of its own measures them
        patch.setattr(loss, "peak_bytes_alone", lambda name, *_: PEAKS[name])
        bench.run(session, ("narrow", "sketch", "loss", "host_time"))
    assert not session.failed
    return out


def test_separation_by_floor_is_that_of_an_estimate_with_that_floor(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 4))
    batches = [[torch.randn(1, 40, 12) * scale] for scale in (torch.linspace(0.1, 3, 12), 1.0)]

    def estimate(floor):
        found = nk.estimate_retain_subspaces(
            model, batches[0], "0", width=12, forget_batches=batches[1], min_editability=floor
        )
        return [entry.separation for entry in found.inputs], found

    estimate(0.3)[1].save(tmp_path / "subspaces")
    separation.main([f"own={tmp_path / 'subspaces'}", f"--out={tmp_path / 'separation.csv'}"])
    rows = {float(row["floor"]): row for row in read(tmp_path / "separation.csv")}
    assert rows.keys() == set(separation.FLOORS)
    for floor in (0.4, 0.1):
        values, _ = estimate(floor)
        assert float(rows[floor]["least"]) == pytest.approx(min(values), rel=1e-4)
        assert float(rows[floor]["most"]) == pytest.approx(max(values), rel=1e-4)
    nk.estimate_retain_subspaces(model, batches[0], "0", width=12, rank=3).save(tmp_path / "bare")
    with pytest.raises(SystemExit):
        separation.main([f"own={tmp_path / 'bare'}", f"--out={tmp_path / 'no.csv'}"])


def assert_timed(rows):
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0
        assert float(row["tflops"]) >= 0
        assert row["timing"] == "clock"
        assert row["tiny"] == "True"
        assert row["commit"]
        assert row["device"]
        if row["provider"] == row["base"]:
            assert float(row["ratio"]) == 1


@pytest.mark.parametrize("op", ["linear", "siblings"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_rows(tmp_path, monkeypatch, capsys, op, dtype):
    """The CPU kernels are timed where they can run, and are no failure where not."""
    monkeypatch.setattr(providers, "BACKENDS", ("eager", "cpu"))  # Triton's interpreter is slow
    session = tiny_session(tmp_path, dtype)
    bench.run(session, (op,))
    assert not session.failed
    rows = read(tmp_path / f"{op}.csv")
    assert_timed(rows)
    assert {row["pass"] for row in rows} == set(linear.PASSES)
    served = dtype == torch.bfloat16 and cpu_extension.unavailable(CPU) is None
    for which in linear.PASSES:
        names = {row["provider"] for row in rows if row["pass"] == which}
        assert {"frozen", "nsru", "peft bf16", "plan eager"} <= names
        assert ("plan cpu" in names) == served
    assert ("no plan cpu" in capsys.readouterr().out) == (not served)


def test_siblings_rows_have_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(providers, "BACKENDS", ())
    siblings.run(tiny_session(tmp_path))
    rows = read(tmp_path / "siblings.csv")
    sizes = {tuple(row[name] for name in ("M", "K", "N", "R", "Q", "widths")) for row in rows}
    assert sizes == {
        ("48", "64", "160", "12", "8", "96+32+32"),
        ("1", "64", "192", "8", "8", "96+96"),
    }
    assert {row["provider"] for row in rows} == {"frozen", "nsru", "single nsru", "peft bf16"}


def test_siblings_read_x_and_write_dx_once():
    shape, alone = cases.Shape(512, 2048, (8192, 8192)), cases.Shape(512, 2048, (8192,))
    of_x = 2 * 512 * 2048
    for which, shared in (
        ("forward", of_x),
        ("backward", 2 * of_x),
        ("forward+backward", 3 * of_x),
    ):
        flop, moved = linear.work(alone, which, 2)
        assert linear.work(shape, which, 2) == (2 * flop, 2 * moved - shared)


def wrong_group(*args, right=internals.projected_linears):
    first, *others = right(*args)
    return [first, *(y * 1.02 for y in others)]


def test_a_wrong_sibling_is_reported_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(providers, "BACKENDS", ())
    monkeypatch.setattr(internals, "projected_linears", wrong_group)
    session = tiny_session(tmp_path)
    siblings.run(session)
    names = {row["provider"] for row in read(tmp_path / "siblings.csv")}
    assert names == {"frozen", "single nsru", "peft bf16"}
    assert len(session.failed) == 2
    assert all("nsru: y of 1 is off by" in failed for failed in session.failed)


def swapped(provider):
    """k for v, which are equally wide."""

    def forward(x):
        q, k, v = provider.forward(x)
        return [q, v, k]

    return dataclasses.replace(provider, forward=forward)


def without_shared_gradient(provider):
    """dX of the first sibling only."""

    def forward(x):
        return [provider.forward(x)[0], *provider.forward(x.detach())[1:]]

    return dataclasses.replace(provider, forward=forward)


def unprojected(provider):
    return dataclasses.replace(provider, projects=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [(swapped, "y of 1"), (without_shared_gradient, "dX"), (unprojected, "dA of 0")],
)
def test_a_wrong_provider_of_siblings_is_noticed(change, what):
    operands = cases.make_operands(cases.Shape(16, 64, (48, 32, 32), 4, 8), torch.float32)
    provider = internals.projected_ops(operands, together=True)
    cases.check(operands, "nsru", provider)
    with pytest.raises(AssertionError, match=f"nsru: {what} is off by"):
        cases.check(operands, "nsru", change(provider))


def test_targets_rows(tmp_path):
    bench.run(session := tiny_session(tmp_path), ("targets",))
    assert not session.failed
    for name, ours in (("linear_cpu", "nsru"), ("siblings_cpu", "group")):
        rows = read(tmp_path / f"{name}.csv")
        assert list(rows[0]) == list(read(ROOT / "benchmarks" / "results" / f"{name}.csv")[0])
        ratios = {row["provider"]: float(row["ratio_to_frozen"]) for row in rows}
        assert ratios["frozen"] == 1
        assert {ours, f"{ours}, fold cached", "peft bf16"} <= ratios.keys()


def test_narrow_rows(walked):
    rows = read(walked / "narrow.csv")
    assert_timed(rows)
    products = {row["product"] for row in rows if row["provider"] == "library"}
    assert products == {"S", "dS + dB", "dA"}
    assert all(float(row["of_copy"]) >= 0 for row in rows)


def test_sketch_rows(walked):
    rows = read(walked / "sketch.csv")
    assert_timed(rows)
    update = {row["provider"]: row for row in rows if row["pass"] == "update"}
    assert {"covariance", "RetainSketch", "plan eager", "svd_lowrank of the batch"} <= (
        update.keys()
    )
    # What a sketch keeps: Y and H in fp32 and fp64, omega in bf16; against K x K in fp32.
    k, width = int(update["RetainSketch"]["K"]), int(update["RetainSketch"]["L"])
    kept = 12 * (k * width + width**2) + 2 * k * width
    assert int(update["RetainSketch"]["state_bytes"]) == kept
    assert int(update["covariance"]["state_bytes"]) == 4 * k * k
    assert update["peft IncrementalPCA"]["centred"] == "True"
    assert update["RetainSketch"]["centred"] == "False"


def test_host_time_rows(walked):
    rows = read(walked / "host_time.csv")
    assert_timed(rows)
    for which in host_time.PASSES:
        providers = {row["provider"] for row in rows if row["pass"] == which}
        assert providers == {"frozen", "peft", "nsru alone", "nsru group"}
    assert {(row["dtype"], row["threads"], row["base"]) for row in rows} == {
        ("float32", "1", "peft")
    }
    assert len({(row["provider"], row["python_calls"]) for row in rows}) == 4


class Counted(torch.nn.Module):
    """Six entries: two of ``__call__``, forward, its generator twice, and ``below``."""

    def forward(self, x):
        return sum(self.parts(x))

    def parts(self, x):
        yield self.below(x)

    def below(self, x):
        return x


def test_python_calls_are_counted():
    layer = Counted()
    counted = host_time.count_python_calls([layer, layer], torch.zeros(2))
    assert counted == (2 * 6, 5, 0, 0)
    assert sys.getprofile() is None
    providers = host_time.make_providers()
    calls = host_time.count_forwards(providers)
    assert 0 < calls["nsru alone"].own_calls < calls["nsru alone"].calls
    assert 0 < calls["nsru alone"].own_deepest < calls["nsru alone"].deepest
    assert calls["peft"].own_calls == calls["frozen"].own_calls == 0


def test_a_wrong_adapter_is_not_timed_for_its_host_time(monkeypatch, tmp_path):
    def project(lora_a, basis, right=providers.nk.project_adapter):
        return 1.01 * right(lora_a, basis)

    monkeypatch.setattr(providers.nk, "project_adapter", project)
    with pytest.raises(AssertionError, match="peft: y of 0 is off by"):
        host_time.run(tiny_session(tmp_path))
    assert not list(tmp_path.iterdir())


def test_loss_rows(walked):
    rows = read(walked / "loss.csv")
    assert_timed(rows)
    assert {"chunked", "full logits"} <= {row["provider"] for row in rows}
    if sys.platform == "linux":
        peaks = {row["provider"]: row["peak_bytes"] for row in rows}
        assert peaks == {name: str(peak) for name, peak in PEAKS.items()}


def test_the_picture_is_small(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "results" / "cpu" / "step.csv", tmp_path)
    (picture,) = plots.main(tmp_path)
    assert picture == tmp_path / "step.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


def wrong_op(monkeypatch):
    def update(method, x_MK, right=sketch_methods.Op.update):
        right(method, x_MK)
        method.h_LL *= 1.01

    monkeypatch.setattr(sketch_methods.Op, "update", update)


def wrong_sketch(monkeypatch):
    def update(method, x_MK):
        method.sketch.update(x_MK[1:])

    monkeypatch.setattr(sketch_methods.Sketch, "update", update)


def wrong_svd(monkeypatch):
    def finish(method, rank):
        basis_KQ = torch.eye(method.batches[0].shape[1])[:, -rank:]
        return basis_KQ, 1.0

    monkeypatch.setattr(sketch_methods.LowRankSVD, "finish", finish)


@pytest.mark.parametrize("make_wrong", [wrong_op, wrong_sketch, wrong_svd])
def test_a_wrong_sketch_is_not_timed(monkeypatch, tmp_path, make_wrong):
    make_wrong(monkeypatch)
    with pytest.raises(AssertionError, match=r"is off by|leaves"):
        sketch.run(tiny_session(tmp_path))
    assert not list(tmp_path.iterdir())


def wrong_value(nll, hidden, head, targets):
    return nll(hidden, head, targets) * 1.001


def wrong_gradient(nll, hidden, head, targets):
    return nll(hidden, head, targets) + 1e-3 * (hidden - hidden.detach()).sum(1)


@pytest.mark.parametrize("change", [wrong_value, wrong_gradient])
def test_a_wrong_loss_is_not_timed(monkeypatch, tmp_path, change):
    provider = loss.Provider(functools.partial(change, loss.token_nll))
    monkeypatch.setitem(loss.PROVIDERS, "chunked", provider)
    with pytest.raises(AssertionError, match=r"chunked: (NLL|gradient) is off by"):
        loss.run(tiny_session(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peaks_are_those_of_one_process_each():
    peaks = {
        name: loss.peak_bytes_alone(name, (512, 16384, 16), torch.bfloat16)
        for name in loss.PROVIDERS
    }
    # Chunks of 2^25 logits hold all 512 tokens here: neither is far above the other.
    assert 0 < peaks["chunked"] <= 2 * peaks["full logits"]
