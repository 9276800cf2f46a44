"""The CUDA backend of the projected linear.

Without a GPU the narrow products run emulated, thread by thread. CUTLASS's GEMM cannot: a stand-in
reads the addresses it is given and multiplies on the CPU, which checks what Python hands over.
Tests marked ``gpu`` run all kernels, small sizes first:
`pytest -m gpu -x tests/kernels/test_linear_cuda.py`.
"""

import contextlib
import re
import types
from pathlib import Path

import pytest
import torch
from linear_cases import check_against_exact, check_backward, check_forward, make_inputs, operands
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels.dispatch import extension
from nsru_kernels.ops.linear import cuda, reference
from nsru_kernels.ops.linear import cuda_products as products
from nsru_kernels.ops.project import triton as project_triton

DTYPES = [torch.bfloat16, torch.float16]
GPU = torch.device("cuda")
ALL = [True, True, False, True, True]
# (M, K, N, R): R below, at and beyond a tile, with rows that need padding and rows that do not.
SMALL = [(1, 8, 8, 1), (130, 72, 264, 3), (64, 136, 40, 16), (70, 64, 128, 64), (33, 200, 72, 100)]
REAL = [(8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (16384, 2048, 8192, 16)]


def one_linear(m, k, n, r, dtype, device="cpu", seed=0):
    """Arguments of ``forward`` for a group of one."""
    return operands(m, k, (n,), (r,), dtype, device=device, seed=seed)


def check_both_passes(args):
    check_forward(cuda, args)
    check_backward(cuda, args, needs=ALL)


# ---------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_operands_are_handed_over_as_they_lie(stand_in, shape, dtype):
    args = one_linear(*shape, dtype)
    check_both_passes(args)
    check_both_passes((*args[:4], [None], [1.0]))


def test_unusual_strides(stand_in):
    x, (w,), a, (b,), (bias,), scalings = one_linear(20, 64, 40, 5, torch.float16)
    sliced = torch.randn(20, 80).half()[:, 8:72]
    cases = (
        (x.T.contiguous().T, w, a, b, bias),
        (sliced, w, a, b, bias),
        (torch.randn(21, 65).half()[1:, 1:], w, a, b, bias),
        (x, torch.nn.functional.pad(w, (0, 8))[:, :64], a, b, bias),
        (x, w, a.T.contiguous().T, b.T.contiguous().T, bias),
        (x, w, a, b, torch.randn(80).half()[::2]),
        (x, w, a, b, torch.randn(41).half()[1:]),
    )
    for x_, w_, a_, b_, bias_ in cases:
        check_both_passes((x_, [w_], a_, [b_], [bias_], scalings))
    (y,), s = cuda.forward(x, [w], a, [b], [bias], scalings)
    dy = torch.ones((), dtype=x.dtype).expand(y.shape)
    rest = x, [w], a, [b], s, scalings, 0.0, None, ALL
    got, expected = (cuda.backward([each], *rest) for each in (dy, dy.contiguous()))
    assert all(one is two or torch.equal(one, two) for one, two in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_function_projects_and_multiplies_in_cuda(
    stand_in, serves_the_cpu, monkeypatch, dtype
):
    """The projection under this name is Triton's kernel."""
    launched, project = [], project_triton.project_into
    monkeypatch.setattr(
        project_triton, "project_into", lambda *args: launched.append(1) or project(*args)
    )
    inputs, basis = make_inputs((3, 7), 40, 24, 5, dtype=dtype)
    check_against_exact(inputs, basis, backend="cuda")
    assert len(launched) == 2, "A forward, its gradient backward"


@pytest.mark.parametrize("ns", [(40,), (40, 24)], ids=str)
def test_library_gemms_between_narrow_kernels(stand_in, monkeypatch, ns):
    """By plan expand_first no GEMM of ours runs."""
    monkeypatch.setattr(cuda, "kext_gemm", None)
    args = operands(33, 64, ns, (4,) * len(ns), torch.bfloat16)
    check_forward(cuda, args, plan="expand_first")
    check_backward(cuda, args, plan="expand_first")
    check_backward(cuda, args, plan="expand_first", unused=(0,))


def test_the_plan_names_configuration_and_swizzle_in_both_passes(stand_in, monkeypatch):
    x, ws, a, bs, _, scalings = one_linear(9, 64, 40, 4, torch.bfloat16)
    asked, launch = [], extension.launch

    def noted(name, near, **call):
        if name == "kext_gemm":
            asked.append((call["config"], call["swizzle"]))
        launch(name, near, **call)

    monkeypatch.setattr(extension, "launch", noted)
    for plan, choice in (
        ("kext 128x128x64_2x1_pingpong/4", (1, 4)),
        ("kext 128x256x64_2x1_cooperative/1", (0, 1)),
        ("kext 128x256x64_2x1_cooperative/3", (products.CHOOSE, 1)),
        (None, (products.CHOOSE, 1)),
    ):
        ys, s = cuda.forward(x, ws, a, bs, [None], scalings, plan=plan)
        cuda.backward(ys, x, ws, a, bs, s, scalings, 0.0, None, ALL, plan=plan)
        assert asked == [choice] * 2
        asked.clear()


def test_configurations_are_those_of_the_extension():
    source = Path(__file__).parents[2] / "csrc/host/kext_plan.h"
    assert tuple(re.findall(r'\{"(\w+)", \d', source.read_text())) == products.CONFIGS


def test_rank_one_with_a_frozen_b(stand_in):
    x, ws, a, bs, _, scalings = one_linear(4, 16, 24, 1, torch.bfloat16)
    ys, s = cuda.forward(x, ws, a, bs, [None], scalings)
    needs = [True, True, False, False, False]
    back = ys, x, ws, a, bs, s, scalings, 0.0, None, needs
    got, expected = cuda.backward(*back), reference.backward(*back)
    assert got[2:] == expected[2:] == [None] * 3
    torch.testing.assert_close(got[:2], expected[:2], rtol=0.02, atol=0.02)


def test_no_tokens_launch_nothing(stand_in):
    check_both_passes(one_linear(0, 64, 40, 4, torch.bfloat16))


def test_only_asked_for_gradients(stand_in):
    x, (w,), a, bs, _, scalings = one_linear(9, 64, 40, 4, torch.bfloat16)
    for wanted in range(5):
        needs = [index == wanted for index in range(5)]
        back = [x @ w.T], x, [w], a, bs, x @ a.T, scalings, 0.0, None, needs
        assert [grad is not None for grad in cuda.backward(*back)] == needs


def test_refusals_name_the_reason_and_the_other_backend():
    x, (w,), a, (b,), *_ = one_linear(8, 64, 40, 4, torch.bfloat16)
    for x_, w_, b_, dropout_p, reason in (
        (x.float(), w.float(), b, 0.0, "bf16 and fp16, got torch.float32"),
        (x, w, b, 0.1, "dropout_p=0.1"),
        (x, w[:39], b[:39], 0.0, r"multiples of 8, got \(39, 64\)"),
        (x, w.T.contiguous().T, b, 0.0, r"got strides \(1, 40\)"),
    ):
        with pytest.raises(nk.BackendUnavailable, match=f"{reason}.*Use 'triton'"):
            cuda.forward(x_, [w_], a, [b_], [None], [1.0], dropout_p)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
def test_other_architectures_are_sent_to_triton(hopper, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = extension.unavailable(GPU)
    assert f"this GPU: {capability[0]}.{capability[1]}" in reason
    assert "Use 'triton'" in reason


def test_what_keeps_the_extension_from_serving(hopper, monkeypatch):
    assert "CUDA device" in extension.unavailable(torch.device("cpu"))

    def missing():
        raise ModuleNotFoundError

    def broken():
        raise ImportError("libfoo.so")

    def module(image=lambda: 90, interface=extension._INTERFACE, **launchers):
        build = {"archs": "80"}
        return types.SimpleNamespace(
            build_info=lambda: build, kernel_image=image, interface=interface, **launchers
        )

    def no_image():
        raise RuntimeError("cudaFuncGetAttributes: cudaErrorNoKernelImageForDevice")

    gemm = {"launch_kext_gemm": None}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for load, reason in (
        (missing, "not built"),
        (broken, "libfoo.so"),
        (lambda: module(interface=1, **gemm), "built from other sources"),
        (module, "built for sm 80 and holds no GEMM for sm_90a"),
        (lambda: module(no_image, **gemm), "cudaErrorNoKernelImageForDevice"),
    ):
        monkeypatch.setattr(extension, "load", load)
        assert reason in extension.unavailable(GPU)
        assert "triton" in extension.unavailable(GPU)
    monkeypatch.setattr(extension, "load", lambda: module(**gemm))
    assert extension.unavailable(GPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in extension.unavailable(GPU)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def module():
    reason = extension.unavailable(GPU)
    return pytest.skip(reason) if reason else extension.load()


def check_gemm(m, k, n, r, dtype, layout, with_bias=True, **choice):
    x, w, p, v, bias = (torch.randn(*shape, device=GPU).to(dtype) for shape in (
        (m, k), (n, k), (m, r), (n, r), (n,)
    ))  # fmt: skip
    p, v = products.padded(p), products.padded(v)
    w, v = (w.T, v.T) if layout == "NK" else (w.T.contiguous(), v.T.contiguous())
    bias = bias if with_bias else None
    got = products.kext_gemm(x, w, p, v, bias, **choice)
    exact = x.double() @ w.double() + p.double() @ v.double()
    eager = x @ w + p @ v
    if bias is not None:
        exact, eager = exact + bias.double(), eager + bias
    assert_close_to_exact(got, eager, exact, f"{m}x{k}x{n} r={r} {layout} {choice}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_gemm_every_config(module, layout, dtype):
    configs = len({kernel["config"] for kernel in module.kext_kernels()})
    for config in range(configs):
        for shape in ((256, 64, 256, 64), (1, 8, 8, 1), (300, 200, 264, 16), (1000, 520, 776, 100)):
            check_gemm(*shape, dtype, layout, config=config)
        check_gemm(1000, 512, 768, 8, dtype, layout, with_bias=False, config=config, swizzle=4)


@pytest.mark.gpu
@pytest.mark.parametrize("r", [1, 8, 16, 64, 100])
def test_both_passes_at_an_odd_number_of_tokens(module, r):
    for dtype in DTYPES:
        check_both_passes(one_linear(8191, 1024, 2048, r, dtype, GPU))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(module, shape, dtype):
    check_both_passes(one_linear(*shape, dtype, GPU))


@pytest.mark.gpu
def test_through_the_public_function(module):
    inputs, _ = make_inputs(515, 256, 384, 16, dtype=torch.bfloat16)
    inputs = {name: tensor.to(GPU) for name, tensor in inputs.items()}
    check_against_exact(inputs, None, backend="cuda")


@pytest.mark.gpu
def test_two_runs_agree_bit_by_bit(module):
    args = one_linear(8192, 4096, 4096, 16, torch.bfloat16, GPU)
    first, second = (cuda.forward(*args)[0][0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_streams_do_not_meet(module):
    args = [one_linear(2048, 1024, 1024, 16, torch.bfloat16, GPU, seed) for seed in range(4)]
    expected = [cuda.forward(*each)[0][0] for each in args]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in args], []
    for stream, each in zip(streams, args, strict=True):
        with torch.cuda.stream(stream):
            got.append([cuda.forward(*each)[0][0] for _ in range(8)])
    torch.cuda.synchronize()
    for runs, value in zip(got, expected, strict=True):
        assert all(torch.equal(run, value) for run in runs)


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_values(module):
    args = one_linear(512, 1024, 1024, 16, torch.bfloat16, GPU)
    x, ws, a, bs, _, scalings = args

    def step():
        ys, s = cuda.forward(*args)
        grads = cuda.backward(ys, x, ws, a, bs, s, scalings, 0.0, None, ALL)
        return *ys, *(grad for grad in grads if grad is not None)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    x.normal_()
    expected = [t.clone() for t in step()]
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


@pytest.mark.gpu
def test_wrong_arguments_are_named(module):
    x, (w,), a, (b,), *_ = one_linear(64, 64, 64, 3, torch.bfloat16, GPU)
    with pytest.raises(ValueError, match="ldp=3: rows of p must start at multiples of 16 bytes"):
        products.kext_gemm(x, w.T, x @ a.T, products.padded(b).T, None)
    with pytest.raises(ValueError, match="config=77"):
        products.kext_gemm(x, w.T, products.padded(x @ a.T), products.padded(b).T, None, config=77)


@pytest.mark.gpu
def test_the_current_device_stays(module):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = one_linear(256, 256, 256, 16, torch.bfloat16, "cuda:1")
    check_both_passes(args)
    assert torch.cuda.current_device() == 0
