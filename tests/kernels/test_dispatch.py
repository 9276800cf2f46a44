"""Choice of the backend: names, the environment variable, refusals and explanations."""

import logging
import types

import pytest
import torch

import nsru_kernels as nk
from nsru_kernels import dispatch
from nsru_kernels.ops.linear import reference

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("NSRU_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._implementation.cache_clear()
    yield
    dispatch._implementation.cache_clear()


def call(backend="auto"):
    return nk.nsru_linear(
        torch.ones(1, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), backend=backend
    )


@pytest.fixture
def fake_kernel(monkeypatch):
    """A triton module for the linear op; its attributes decide what it says of itself."""
    kernel = types.SimpleNamespace(plan=lambda *args: None)
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", lambda device: None)
    find, load = dispatch.importlib.util.find_spec, dispatch._load
    path = "nsru_kernels.ops.linear.triton"
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name: kernel if name == path else find(name)
    )
    monkeypatch.setattr(
        dispatch,
        "_load",
        lambda op, backend: kernel if (op, backend) == ("linear", "triton") else load(op, backend),
    )
    return kernel


def test_auto_and_eager_take_the_reference_on_a_cpu():
    assert dispatch.implementation("linear", "auto", CPU) is reference
    assert dispatch.implementation("linear", "eager", CPU) is reference
    assert torch.equal(call("auto"), call("eager"))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_never_falls_back(backend):
    with pytest.raises(
        nk.BackendUnavailable, match=rf"backend='{backend}' cannot serve linear on cpu"
    ):
        call(backend)
    with pytest.raises(nk.BackendUnavailable, match=r"Use backend='eager'"):
        nk.project_adapter(torch.ones(1, 4), torch.ones(4, 1), backend=backend)


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'eager', 'triton'"):
        call("tritn")
    monkeypatch.setenv("NSRU_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"NSRU_BACKEND must be 'auto' or one of .* got 'gpu'"):
        call()
    assert call("eager").shape == (1, 3)


def test_environment_variable_decides_what_auto_means(monkeypatch):
    monkeypatch.setenv("NSRU_BACKEND", "cuda")
    with pytest.raises(nk.BackendUnavailable, match=r"backend='cuda'"):
        call()
    assert call("eager").shape == (1, 3), "a backend named in the call wins"
    monkeypatch.setenv("NSRU_BACKEND", "eager")
    assert call().shape == (1, 3)


def test_explain_names_one_backend_and_a_reason_for_each():
    for op in dispatch.OPS:
        explanation = nk.explain(op, torch.ones(1, 4))
        assert explanation.backend == "eager"
        assert [v.backend for v in explanation.verdicts] == ["cuda", "triton", "eager"]
        assert all(verdict.reason for verdict in explanation.verdicts)
        for verdict in explanation.verdicts:
            assert verdict.reason in str(explanation)


def test_explain_reads_the_device_from_the_arguments():
    meta = torch.ones(1, 4, device="meta")
    assert nk.explain("nsru_linear", meta).device == "meta"
    assert nk.explain("project_adapters", [meta], [None]).device == "meta"
    assert nk.explain("nsru_linear").device == str(dispatch.default_device())


def test_explain_where_nothing_serves(monkeypatch):
    monkeypatch.setenv("NSRU_BACKEND", "triton")
    explanation = nk.explain("nsru_linear", torch.ones(1, 4))
    assert explanation.backend is None
    assert "no backend, a call raises" in str(explanation)
    assert "NSRU_BACKEND=triton is set" in str(explanation)


def test_explain_refuses_unknown_ops():
    with pytest.raises(ValueError, match=r"op must be one of nsru_linear, .* got 'linear'"):
        nk.explain("linear")


def test_auto_takes_no_kernel_without_a_measurement(fake_kernel, caplog):
    with caplog.at_level(logging.INFO, "nsru_kernels"):
        assert dispatch.implementation("linear", "auto", GPU) is reference
        assert dispatch.implementation("linear", "auto", GPU) is reference
    skipped = [r.getMessage() for r in caplog.records if "auto skips triton" in r.getMessage()]
    assert len(skipped) == 1, "each skipped backend is logged once"
    assert "no measurement for this GPU" in skipped[0]
    assert dispatch.implementation("linear", "triton", GPU) is fake_kernel


def test_auto_takes_a_measured_kernel(fake_kernel):
    fake_kernel.plan = lambda *args: "expand_first"
    assert dispatch.implementation("linear", "auto", GPU) is fake_kernel
    chosen = [v.backend for v in dispatch._verdicts("nsru_linear", GPU, ()) if v.serves]
    assert chosen == ["triton"]


def test_a_kernel_says_why_it_cannot_run(fake_kernel, monkeypatch):
    reason = "needs compute capability 8.0 (this GPU: 7.5)."
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", lambda device: reason)
    assert dispatch.implementation("linear", "auto", GPU) is reference
    with pytest.raises(nk.BackendUnavailable, match=r"compute capability 8.0"):
        dispatch.implementation("linear", "triton", GPU)
