"""Benchmarks walk through on a CPU: sane rows, pictures, and no figure for a wrong provider."""

import csv
import functools
import sys
from pathlib import Path

import pytest
import torch

from nsru_bench import bench, loss, plot, sketch, sketch_accuracy, sketch_methods
from nsru_bench.session import Session

ROOT = Path(__file__).parents[1]


def tiny_session(out):
    return Session(torch.device("cpu"), torch.float32, tiny=True, rounds=2, out=out)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder that a tiny run of some benchmarks leaves."""
    out = tmp_path_factory.mktemp("bench")
    session = tiny_session(out)
    bench.run(session, ("narrow", "sketch", "loss"))
    assert not session.failed
    return out


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


def test_sketch_times_both_triton_routes(walked):
    providers = {row["provider"] for row in read(walked / "sketch.csv")}
    if torch.cuda.is_available() or sys.modules.get("triton") is None:
        pytest.skip("the kernels run on this CPU only where Triton interprets them")
    assert {"plan triton one_read", "plan triton two_reads"} <= providers


def test_accuracy_rows(walked):
    rows = read(walked / "sketch_accuracy.csv")
    assert {row["spectrum"] for row in rows} == {
        sketch_accuracy.HARMONIC,
        sketch_accuracy.MEAN,
        *(name for name, _ in sketch_accuracy.published_spectra(60, 4)),
    }
    for row in rows:
        assert 0 <= float(row["residual"]) <= 1
        assert row["certified"] == str(row["provider"].startswith("RetainSketch"))
        if row["ratio"]:
            assert float(row["ratio"]) >= 1 - 1e-5
        if row["certified"] == "True":
            assert float(row["claim_error"]) <= 1e-6
    harmonic = {
        (row["provider"], int(row["L"])): float(row["ratio"])
        for row in rows
        if row["spectrum"] == sketch_accuracy.HARMONIC
    }
    assert harmonic["covariance + eigh", 60] == pytest.approx(1, abs=1e-5)
    assert harmonic["RetainSketch", 15] <= 1.1


def test_centring_loses_the_mean(walked):
    """What a null space must keep is not what a principal component analysis finds."""
    rows = read(walked / "sketch_accuracy.csv")
    ratios = {
        row["provider"]: float(row["ratio"])
        for row in rows
        if row["spectrum"] == sketch_accuracy.MEAN
    }
    assert ratios["peft IncrementalPCA"] > 2
    assert ratios["RetainSketch"] < 1.1


def test_loss_rows(walked):
    rows = read(walked / "loss.csv")
    assert_timed(rows)
    assert {"chunked", "full logits"} <= {row["provider"] for row in rows}
    if sys.platform == "linux":
        assert all(int(row["peak_bytes"]) > 0 for row in rows)


def test_pictures_are_small(walked):
    pictures = plot.main(walked)
    assert {path.name for path in pictures} == {"sketch_accuracy.png", "loss.png"}
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


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


def test_a_broken_certificate_is_not_reported(monkeypatch, tmp_path):
    def finish(method, rank, right=sketch_methods.Sketch.finish):
        basis_KQ, claimed = right(method, rank)
        return basis_KQ, claimed + 1

    monkeypatch.setattr(sketch_methods.Sketch, "finish", finish)
    with pytest.raises(AssertionError, match="certifies"):
        sketch_accuracy.run(tiny_session(tmp_path))


def wrong_value(nll, hidden, head, targets):
    return nll(hidden, head, targets) * 1.001


def wrong_gradient(nll, hidden, head, targets):
    return nll(hidden, head, targets) + 1e-3 * (hidden - hidden.detach()).sum(1)


@pytest.mark.parametrize("change", [wrong_value, wrong_gradient])
def test_a_wrong_loss_is_not_timed(monkeypatch, tmp_path, change):
    provider = loss.Provider(functools.partial(change, loss.chunked))
    monkeypatch.setitem(loss.PROVIDERS, "chunked", provider)
    with pytest.raises(AssertionError, match=r"chunked: (NLL|gradient) is off by"):
        loss.run(tiny_session(tmp_path))
    assert not list(tmp_path.iterdir())


def test_resident_memory_of_the_script(tmp_path):
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    out = tmp_path / "nll_memory.csv"
    loss.main(["--tokens", "512", "--vocabulary", "16384", "--width", "16", "--out", str(out)])
    peaks = {row["provider"]: int(row["peak_bytes"]) for row in read(out)}
    assert list(read(out)[0]) == list(read(ROOT / "benchmarks" / "results" / out.name)[0])
    # Chunks of 2^25 logits hold all 512 tokens here: neither is far above the other.
    assert 0 < peaks["chunked"] <= 2 * peaks["full logits"]
    assert plot.draw(out).stat().st_size < 150_000
