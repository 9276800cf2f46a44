"""The walk through the benchmark of steps, and that it notices a wrong way."""

import pytest
import torch

from nsru_bench import step, training_ways
from nsru_bench.rows import read
from nsru_bench.session import Session

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path):
    return Session(CPU, torch.float32, tiny=True, rounds=2, out=tmp_path)


@pytest.fixture(scope="module")
def base():
    return training_ways.make_model(training_ways.TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def batch(base):
    (made,) = training_ways.make_batches(training_ways.TINY, CPU, 1)
    return training_ways.with_reference(base, made)


def checked(ways, batch):
    step.check(ways, step.evaluate_ways(ways, batch), torch.float32)


def test_step_writes_a_row_for_every_way(session):
    step.run(session)
    rows = {row["provider"]: row for row in read(session.out / "step.csv")}
    assert set(rows) == {"frozen", *training_ways.ADAPTED, training_ways.FULL}
    for row in rows.values():
        seconds = float(row["p50_ms"]) / 1e3
        assert float(row["tokens_per_s"]) == pytest.approx(64 / seconds, rel=1e-3)
        flop = float(row["mfu"]) * session.limits.flops * seconds
        assert flop == pytest.approx(float(row["tflops"]) * 1e12 * seconds, rel=0.2, abs=1e8)
        assert 0 < int(row["peak_bytes"]) < int(row["total_bytes"])
    resident = {name: int(row["resident_bytes"]) for name, row in rows.items()}
    assert (
        resident["frozen"] < resident["peft bf16"] < resident["nsru"] < resident[training_ways.FULL]
    )
    assert float(rows["frozen"]["ratio"]) == 1


def test_all_ways_agree(base, batch):
    checked(training_ways.make_ways(training_ways.TINY, base), batch)


def test_a_projection_that_is_left_out_is_noticed(base, batch, monkeypatch):
    monkeypatch.setattr(training_ways, "projection", lambda basis: lambda module, args: args)
    ways = training_ways.make_ways(training_ways.TINY, base, training_ways.ADAPTED)
    with pytest.raises(AssertionError, match=r"eager projection: loss .* off by"):
        checked(ways, batch)


@pytest.mark.parametrize(("factor", "what"), [(-20.0, "loss"), (1.02, "nsru: d[AB] is")])
def test_a_wrong_adapter_is_noticed_by_its_loss_or_its_gradients(base, batch, factor, what):
    ways = training_ways.make_ways(training_ways.TINY, base, training_ways.ADAPTED)
    module = training_ways.nsru_modules(ways["nsru"].model)["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        module.lora_A.mul_(factor)
    with pytest.raises(AssertionError, match=f"{what}.* off by"):
        checked(ways, batch)


def test_a_gradient_that_is_not_projected_is_noticed(base, batch):
    ways = training_ways.make_ways(training_ways.TINY, base, ("nsru",))
    results = step.evaluate_ways(ways, batch)
    results["nsru"].gradients[0].add_(results["nsru"].gradients[0].norm())
    with pytest.raises(AssertionError, match="inside the retain subspace"):
        step.check(ways, results, torch.float32)


def test_a_way_that_does_not_train_is_noticed(base, batch):
    ways = training_ways.make_ways(training_ways.TINY, base, ("frozen", "nsru"))
    for module in training_ways.nsru_modules(ways["nsru"].model).values():
        torch.nn.init.zeros_(module.lora_B)
    with pytest.raises(AssertionError, match="lora_A is zero"):
        checked(ways, batch)


def test_full_fine_tuning_is_left_out_where_it_does_not_fit(base, monkeypatch, capsys):
    monkeypatch.setattr(training_ways, "free_bytes", lambda device: 1000)
    assert training_ways.FULL not in training_ways.make_ways(training_ways.TINY, base)
    assert "is not timed" in capsys.readouterr().out


def test_one_way_out_of_memory_leaves_the_others(base, batch, capsys):
    def fail(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    ways = training_ways.make_ways(training_ways.TINY, base, ("frozen", "nsru"))
    ways["nsru"] = training_ways.Way(ways["nsru"].model, None, prepare=fail)
    checked(ways, batch)
    assert list(ways) == ["frozen"]
    assert "nsru is not timed: CUDA out of memory" in capsys.readouterr().out


def test_a_step_moves_the_adapters_and_nothing_else(base, batch):
    ways = training_ways.make_ways(training_ways.TINY, base, ("nsru", training_ways.FULL))
    before = {name: p.detach().clone() for name, p in ways["nsru"].model.named_parameters()}
    for way in ways.values():
        way.step(batch)
    after = dict(ways["nsru"].model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert not torch.equal(ways[training_ways.FULL].model.lm_head.weight, base.lm_head.weight), (
        "the second model must not share weights with the reference"
    )
