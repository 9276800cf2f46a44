"""Choice of the backend: names, the environment variable, refusals and explanations."""

import dataclasses
import functools
import importlib
import json
import logging
import types

import pytest
import torch

import nsru_kernels as nk
from nsru_kernels.dispatch import choice as dispatch
from nsru_kernels.dispatch import cpu_extension, extension, launch, plans
from nsru_kernels.dispatch import explain as explain_module
from nsru_kernels.dispatch.explain import OPS
from nsru_kernels.ops.linear import autograd, reference
from nsru_kernels.ops.linear.backends import LINEAR
from nsru_kernels.ops.project.backends import PROJECT

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def clear_caches():
    dispatch.choose.cache_clear()
    dispatch._log_skipped.cache_clear()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("NSRU_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clear_caches()
    yield
    clear_caches()


def call(backend="auto"):
    return nk.nsru_linear(
        torch.ones(1, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), backend=backend
    )


def chosen(requested, device, function="forward", dtypes=(), op=LINEAR):
    return dispatch.choose(op, requested, device, "linear", function, (), dtypes, threads=1)


@pytest.fixture
def fake_kernel(monkeypatch):
    """A triton module for the linear op; its attributes decide what it says of itself."""
    kernel = types.SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU without a table")
    monkeypatch.setattr(launch, "unavailable", lambda device: None)

    def load(backend):
        return kernel if backend == "triton" else LINEAR.load(backend)

    kernel.op = dataclasses.replace(LINEAR, load=load)
    monkeypatch.setattr(autograd, "LINEAR", kernel.op)
    monkeypatch.setitem(OPS, "nsru_linear", (kernel.op, OPS["nsru_linear"][1]))
    return kernel


def test_auto_and_eager_take_the_reference_on_a_cpu():
    assert chosen("auto", CPU).module is reference
    assert chosen("eager", CPU).module is reference
    assert torch.equal(call("auto"), call("eager"))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_never_falls_back(backend):
    with pytest.raises(
        nk.BackendUnavailable, match=rf"backend='{backend}' cannot serve nsru_linear on cpu"
    ):
        call(backend)
    several = torch.ones(1, 4), *([torch.ones(size)] * 2 for size in ((3, 4), (2, 4), (3, 2)))
    with pytest.raises(nk.BackendUnavailable, match=rf"backend='{backend}' cannot serve"):
        nk.nsru_linear_group(*several, scalings=[1.0] * 2, backend=backend)
    with pytest.raises(nk.BackendUnavailable, match=r"Use backend='eager'"):
        nk.project_adapter(torch.ones(1, 4), torch.ones(4, 1), backend=backend)


def test_the_projection_under_the_name_of_cuda_is_tritons_kernel(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(extension, "unavailable", lambda device: None)
    a, basis = torch.randn(3, 40), torch.linalg.qr(torch.randn(40, 8)).Q
    with pytest.raises(nk.BackendUnavailable, match=r"'cuda' .*Triton kernels need tensors on a"):
        nk.project_adapter(a, basis, backend="cuda")
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    clear_caches()
    assert dispatch.choose(
        PROJECT, "cuda", CPU, "fold", "fold_many", (1,), (torch.float32,), threads=1
    ).module is PROJECT.load("triton")
    assert "Triton's serve" in str(nk.explain("project_adapter", a, basis))


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'eager', 'cpu'"):
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
    for op in OPS:
        explanation = nk.explain(op, torch.ones(1, 4))
        assert explanation.backend == "eager"
        assert [v.backend for v in explanation.verdicts] == ["cuda", "triton", "cpu", "eager"]
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
        assert chosen("auto", GPU, op=fake_kernel.op).module is reference
        assert chosen("auto", GPU, op=fake_kernel.op).module is reference
    skipped = [r.getMessage() for r in caplog.records if "auto skips triton" in r.getMessage()]
    assert len(skipped) == 1, "each skipped backend is logged once"
    assert "no measurement for this device" in skipped[0]
    assert chosen("triton", GPU, op=fake_kernel.op).module is fake_kernel


def test_auto_takes_a_measured_kernel(fake_kernel, monkeypatch):
    monkeypatch.setattr(plans, "choose", lambda *args: plans.Winner("triton", "kext"))
    assert chosen("auto", GPU, op=fake_kernel.op).module is fake_kernel
    verdicts = nk.explain("nsru_linear").verdicts
    assert [(v.backend, v.reason) for v in verdicts if v.serves] == [
        ("triton", "measured plan kext")
    ]


def forward(backend="auto", dtype=torch.float32):
    x, w, a, b = (torch.ones(s, dtype=dtype) for s in ((1, 4), (3, 4), (2, 4), (3, 2)))
    return autograd._forward(x, [w], a, [b], [None], [1.0], 0.0, None, backend)


def backward(dropout_p, backend="auto"):
    dy, x, w, a, b, s = (
        torch.ones(shape) for shape in ((1, 3), (1, 4), (3, 4), (2, 4), (3, 2), (1, 2))
    )
    needs, seed = [True] * 5, torch.tensor(0)
    return autograd._backward(
        [dy], x, [w], a, [b], s, [1.0], dropout_p, seed, needs, backend
    )  # fmt: skip


def test_a_measured_plan_reaches_the_function_and_dropout_keeps_one_backend(
    fake_kernel, monkeypatch
):
    winners = {"forward": plans.Winner("triton", "kext"), "backward": plans.Winner("eager", None)}
    monkeypatch.setattr(plans, "choose", lambda op, function, *args: winners[function])
    fake_kernel.forward = lambda *args, plan=None: ("forward", plan)
    fake_kernel.backward = lambda *args: "backward"
    fake_kernel.PLANS = ("kext",)
    assert forward() == ("forward", "kext")
    assert forward("triton") == ("forward", None)
    assert backward(dropout_p=0.5) == "backward"
    assert isinstance(backward(dropout_p=0.0), list), "by the reference"
    assert chosen("auto", GPU, "backward", op=fake_kernel.op).module is reference


def test_auto_falls_back_where_a_measured_kernel_cannot_serve(fake_kernel, monkeypatch):
    monkeypatch.setattr(plans, "choose", lambda *args: plans.Winner("triton", "kext"))

    def refuse(*args, plan=None):
        raise nk.BackendUnavailable("not this layout")

    fake_kernel.forward = refuse
    monkeypatch.setattr(reference, "forward", lambda *args: "eager")
    assert forward() == "eager"
    with pytest.raises(nk.BackendUnavailable, match="not this layout"):
        forward("triton")
    fake_kernel.forward = lambda *args: "kernel"
    assert forward(dtype=torch.float64) == "eager"
    assert forward() == "kernel"


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{", '{"fold": 3}', '{"fold": [{"fold_many": "triton"}]}',
     '{"fold": [{"sizes": [0], "fold_many": "triton"}]}',
     '{"fold": [{"sizes": [], "fold_many": "triton"}]}',
     '{"fold": [{"sizes": [1%s], "fold_many": "triton"}]}' % ("0" * 400),
     '{"fold": [{"sizes": [224], "fold_many": null}]}',
     '{"fold": [{"sizes": [224], "fold_many": "rocm"}]}',
     '{"threads": null, "fold": []}'],
)  # fmt: skip
def test_a_damaged_table_counts_as_not_measured(measured, tmp_path, damage):
    (tmp_path / "nvidia-test-1.json").write_text(damage)
    plans._table.cache_clear()
    assert measured(op="fold", function="fold_many", sizes=(224,)) is None


@pytest.fixture
def write_table(monkeypatch, tmp_path):
    """Writes a table into a folder that stands for plans/."""

    def write(name, table):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))

    monkeypatch.setattr(plans, "FOLDER", tmp_path)
    plans._table.cache_clear()
    yield write
    plans._table.cache_clear()


@pytest.fixture
def measured(monkeypatch, write_table):
    """A table for the GPU "NVIDIA Test 1"."""
    table = {
        "linear": [
            {"sizes": [8192, 4096, 4096, 16], "forward": "triton kext", "backward": "eager"},
            {"sizes": [1, 4096, 4096, 16], "forward": "triton decode"},
        ],
        "fold": [{"sizes": [224], "fold_many": "triton"}],
    }
    write_table("nvidia-test-1", table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    return functools.partial(plans.choose, device=GPU, threads=1)


def test_nearest_measured_sizes_within_a_factor_of_two(measured):
    def linear(function, *sizes):
        return measured(op="linear", function=function, sizes=sizes)

    assert linear("forward", 8192, 4096, 4096, 16) == ("triton", "kext")
    assert linear("forward", 5000, 4096, 8192, 8) == ("triton", "kext")
    assert linear("forward", 4000, 4096, 4096, 16) is None, "more than an octave away"
    assert linear("forward", 2, 4096, 4096, 16) == ("triton", "decode")
    assert linear("backward", 8192, 4096, 4096, 16) == ("eager", None)
    assert linear("backward", 1, 4096, 4096, 16) is None, "was not measured"
    assert linear("forward", 0, 4096, 4096, 16) is None
    assert measured(op="fold", function="fold_many", sizes=(160,)) == ("triton", None)
    assert measured(op="fold", function="fold_many", sizes=(1,)) is None
    assert measured(op="sketch", function="update_sketch", sizes=()) is None
    cpu = torch.device("cpu")
    assert plans.choose("fold", "fold_many", cpu, (224,), threads=1) is None


def test_h100_and_h200_take_each_others_winners_and_say_so(monkeypatch, write_table):
    entry = {"sizes": [8192, 4096, 4096, 16], "forward": "eager expand_first", "backward": "eager"}
    own = {"sizes": [16, 4096, 4096, 16], "forward": "eager", "backward": "eager"}
    write_table("nvidia-h100-80gb-hbm3", {"linear": [entry, own | {"forward": "eager addmm"}]})
    write_table("nvidia-h200", {"linear": [own]})
    query = functools.partial(plans.choose, "linear", "forward", GPU, threads=1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert query((8192, 4096, 4096, 16)) == ("eager", "expand_first")
    assert query((16, 4096, 4096, 16)) == ("eager", None), "its own comes first"
    x = types.SimpleNamespace(device=GPU, dtype=torch.bfloat16, shape=(8192, 4096))
    monkeypatch.setattr(explain_module, "_tensors", lambda args: [x])
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    sizes = dispatch.Query("linear", "forward", (8192, 4096, 4096, 16))
    monkeypatch.setitem(OPS, "nsru_linear", (LINEAR, lambda args: sizes))
    assert "plan expand_first on NVIDIA H100 80GB HBM3" in str(nk.explain("nsru_linear", x))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert query((8192, 4096, 4096, 16)) is None


def test_a_plan_travels_with_its_configuration_in_both_passes(fake_kernel, monkeypatch):
    plan = "kext 128x256x64g8w8s3"
    monkeypatch.setattr(plans, "choose", lambda *args: plans.Winner("triton", plan))
    fake_kernel.PLANS = ("kext",)
    fake_kernel.forward = lambda *args, plan=None: plan
    fake_kernel.backward = lambda *args, plan=None: plan
    assert forward() == backward(dropout_p=0.0) == plan
    assert backward(dropout_p=0.5) is None, "measured without dropout"
    fake_kernel.PLANS = ("another",)
    clear_caches()
    assert forward() is None


def test_a_kernel_says_why_it_cannot_run(fake_kernel, monkeypatch):
    reason = "needs compute capability 8.0 (this GPU: 7.5)."
    monkeypatch.setattr(launch, "unavailable", lambda device: reason)
    assert chosen("auto", GPU, op=fake_kernel.op).module is reference
    with pytest.raises(nk.BackendUnavailable, match=r"compute capability 8.0"):
        chosen("triton", GPU, op=fake_kernel.op)


@pytest.mark.parametrize(
    ("capability", "row"), [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((12, 0), 86), ((10, 3), 100)]
)
def test_triton_serves_the_gpus_that_it_was_compiled_for(capability, row, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.unavailable(GPU) is None
    assert launch.architecture(GPU) == row


def test_triton_names_the_gpus_that_it_was_compiled_for(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.6, 8.9, 9.0, 10.0, 10.3, 12.0 (this GPU: 7.5)" in launch.unavailable(GPU)


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "_installed", lambda module: module == "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "Triton 3.4 or newer is needed, as of PyTorch 2.8" in launch.unavailable(GPU)


def test_a_named_backend_refuses_dtypes_and_explain_names_the_one_it_does_not_take(cpu_table):
    a, basis = torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(64, 2)
    with pytest.raises(nk.BackendUnavailable, match=r"kernels take float32, got torch\.bfloat16"):
        nk.project_adapter(a, basis, backend="cpu")
    assert "take float32, got torch.bfloat16" in str(nk.explain("project_adapter", a, basis))
    assert nk.project_adapter(a, basis).dtype == torch.bfloat16, "auto takes eager"


@pytest.fixture
def cpu_table(monkeypatch, write_table):
    """A table for CPUs, as on one that can run the kernels."""
    entry = {"sizes": [512, 64, 32, 4], "forward": "cpu", "backward": "cpu"}
    fold = {"sizes": [1], "fold_many": "cpu"}
    write_table("cpu-with-amx", {"threads": 2, "linear": [entry], "fold": [fold]})
    monkeypatch.setattr(cpu_extension, "_unavailable", lambda: None)


def test_auto_takes_cpu_kernels_up_to_the_threads_that_were_measured(cpu_table, threads):
    args = torch.ones(512, 64, dtype=torch.bfloat16), torch.ones(32, 64), torch.ones(4, 64)
    for count, backend in ((1, "cpu"), (2, "cpu"), (3, "eager")):
        threads(count)
        explanation = nk.explain("nsru_linear", *args)
        assert explanation.backend == backend
    assert "at most 2 threads (now: 3)" in str(explanation)
    threads(2)
    a, basis = torch.ones(4, 64), torch.ones(64, 2)
    for u, backend in ((basis, "cpu"), (basis.bfloat16(), "eager")):
        assert nk.explain("project_adapter", a, u).backend == backend
        assert nk.explain("project_adapters", [a], [u]).backend == backend
    assert nk.explain("project_adapters", [a] * 3, [basis] * 3).backend == "eager", "not measured"
    sketch = nk.explain("RetainSketch.update")
    assert sketch.backend == "eager"
    assert "the same library GEMMs" in str(sketch)


def test_auto_leaves_other_dtypes_and_dropout_to_eager(cpu_table, threads, monkeypatch):
    threads(1)
    module = importlib.import_module("nsru_kernels.ops.linear.cpu")
    ran = []

    def watched(x, *args):
        ran.append(x.dtype)
        cpu_extension.check_operands(x, args[5])
        return reference.forward(x, *args)

    monkeypatch.setattr(module, "forward", watched)
    x, w, a, b = (
        torch.ones(s, dtype=torch.bfloat16) for s in ((512, 64), (32, 64), (4, 64), (32, 4))
    )
    assert nk.nsru_linear(x, w, a, b).dtype == torch.bfloat16
    assert ran == [torch.bfloat16]
    nk.nsru_linear(x, w, a, b, dropout_p=0.5)
    assert len(ran) == 2, "asked, refused, served by eager"
    nk.nsru_linear(x.float(), w.float(), a, b)
    assert len(ran) == 2
    explanation = nk.explain("nsru_linear", x.float(), w, a)
    assert explanation.backend == "eager"
    assert "take bfloat16, got torch.float32" in str(explanation)
    with torch.autocast("cpu", torch.bfloat16):
        assert nk.explain("nsru_linear", x.float(), w, a).backend == "cpu"


@pytest.mark.parametrize(
    ("where", "module", "reason"),
    [
        (("Darwin", "arm64"), None, "for x86-64 Linux"),
        (("Linux", "x86_64"), ModuleNotFoundError("_cpu"), "is not built"),
        (("Linux", "x86_64"), ImportError("undefined symbol"), "does not load: undefined symbol"),
        (("Linux", "x86_64"), types.SimpleNamespace(interface=0), "from other sources"),
        (
            ("Linux", "x86_64"),
            types.SimpleNamespace(interface=cpu_extension._INTERFACE, unavailable=lambda: "no AMX"),
            "no AMX. Use",
        ),
    ],
)
def test_a_cpu_that_cannot_says_why(monkeypatch, where, module, reason):
    def load():
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(cpu_extension.platform, "system", lambda: where[0])
    monkeypatch.setattr(cpu_extension.platform, "machine", lambda: where[1])
    monkeypatch.setattr(cpu_extension, "load", load)
    cpu_extension._unavailable.cache_clear()
    try:
        with pytest.raises(nk.BackendUnavailable, match=reason):
            call("cpu")
        assert nk.explain("nsru_linear").backend == "eager"
    finally:
        cpu_extension._unavailable.cache_clear()
