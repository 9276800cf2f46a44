"""The library's update by 16-bit products, a GPU's default: here with a stand-in for cuBLAS's."""

import functools

import pytest
import torch
from sketch_cases import check_masked_rows_are_not_read, check_nothing_changes, check_update, inputs

from nsru_kernels.dispatch import choose, default_device
from nsru_kernels.ops.sketch import energy_limit, reference
from nsru_kernels.subspaces import RetainSketch

DEVICE = default_device()
SHORT = [torch.float16, torch.bfloat16]
draw = functools.partial(inputs, device=DEVICE)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The dtypes of the factors of each product."""
    seen = []

    def product(left, right):
        assert left.dtype == right.dtype
        seen.append(left.dtype)
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()  # no mm with out_dtype on a CPU

    monkeypatch.setattr(reference, "_product", product)
    return seen


@pytest.fixture
def no_waiting(monkeypatch):
    """The host must not ask the device for a value."""

    def ask(self):
        raise AssertionError("the host waits for the device")

    for name in ("__bool__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, ask)


def short(x, omega, y, h, mask=None, split=False):
    """The exact ‖x‖² is returned: on a CPU the norm of a row adds in sequence and is less so."""
    trace = reference.update_short(x, omega, y, h, mask, split, energy_limit(y.dtype))
    kept = x.double() if mask is None else x[mask].double()
    exact = kept.square().sum()
    torch.testing.assert_close(trace, exact, rtol=1e-5, atol=0, equal_nan=True)
    return exact


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", [(0, 17, 20), (1, 1, 1), (63, 17, 65), (130, 200, 20)], ids=str)
def test_update_is_its_formula(shape, split, dtype, products):
    check_update(short, *draw(*shape, dtype), split=split)
    assert set(products) == {dtype}, "nothing is widened before it is multiplied"


def test_masked_rows_are_not_read():
    check_masked_rows_are_not_read(short, *draw(130, 40, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_changes_nothing(bad):
    x, *others = draw(20, 17, 5)
    x[3, 4] = bad
    check_nothing_changes(short, x, *others)


def test_fp16_saturates_instead_of_overflowing():
    x = torch.full((4, 64), 200.0, dtype=torch.float16, device=DEVICE)
    y, h = torch.zeros(64, 2, device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    short(x, torch.full((64, 2), 100.0, device=DEVICE), y, h)
    assert torch.equal(h, torch.full_like(h, 4 * 65504.0**2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_host_waits_for_nothing(masked, no_waiting):
    x, omega, y, h = draw(20, 17, 5)
    mask = torch.arange(20, device=DEVICE) > 3 if masked else None
    reference.update_short(x, omega, y, h, mask, False, energy_limit(y.dtype))


def test_a_gpu_takes_it_without_a_plan(monkeypatch):
    x, _, y, _ = draw(4, 8, 2)
    assert reference.multiplies_short(x, y) == x.is_cuda
    on_gpu = type("OnGpu", (), {"is_cuda": True, "dtype": torch.bfloat16})()
    assert reference.multiplies_short(on_gpu, y)
    assert not reference.multiplies_short(on_gpu, y.double())
    monkeypatch.setattr(reference, "multiplies_short", lambda x, y: x.dtype.itemsize == 2)
    choose.cache_clear()
    called, right = [], reference.update_short
    monkeypatch.setattr(reference, "update_short", lambda *args: called.append(1) or right(*args))
    sketch = RetainSketch(64, 8, device=DEVICE)
    sketch.update(torch.randn(20, 64, device=DEVICE).bfloat16())
    assert called
    assert sketch.finalize(4).basis.isfinite().all()
