"""The Triton kernels of the projected linear: interpreted on a CPU, run on a GPU if there is one.

bf16 is left to GPUs: the interpreter multiplies it wrongly without a word.
"""

import functools

import pytest
import torch
from linear_cases import activation_projection, check_against_exact, make_inputs, run
from tolerance import assert_close_to_exact
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.ops import launch
from nsru_kernels.ops.linear import reference

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from nsru_kernels.ops.linear import triton, triton_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
# (M, K, N, R): tokens for one and several row blocks, sizes below, at and beyond a tile.
SHAPES = [(1, 24, 20, 4), (16, 64, 32, 16), (63, 130, 70, 17), (130, 72, 264, 3), (70, 33, 29, 70)]

linear = functools.partial(nk.nsru_linear, backend="triton")


def inputs_on_device(*args, **kwargs):
    inputs, basis = make_inputs(*args, **kwargs)
    return {n: t.to(DEVICE) for n, t in inputs.items()}, None if basis is None else basis.to(DEVICE)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def operands(m, k, n, r, dtype, seed=0):
    """(x, W, Ā, B, bias) on the device."""
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=g)
    tensors = draw(m, k), draw(n, k) / k**0.5, draw(r, k) / k**0.5, draw(n, r), draw(n)
    return [t.to(DEVICE, dtype) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_every_gradient(shape, dtype):
    m, k, n, r = shape
    check_against_exact(*inputs_on_device(m, k, n, r, 6, dtype=dtype), function=linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", triton.PLANS)
@pytest.mark.parametrize("shape", [(5, 40, 24, 3), (16, 136, 72, 8), (140, 136, 264, 8)], ids=str)
def test_every_plan_gives_the_same_forward(monkeypatch, shape, plan, dtype):
    if plan == "decode" and shape[0] > triton.DECODE_TOKENS:
        pytest.skip("decode is for few tokens")
    if plan == "kext_tma" and dtype == torch.float32:
        pytest.skip("TMA serves 16-bit operands")
    args = operands(*shape, dtype)
    exact = reference.forward(*(t.double() for t in args), 1.7, 0.0, None)
    eager = reference.forward(*args, 1.7, 0.0, None)
    got = triton.forward(*args, 1.7, 0.0, None, plan)
    for name, values in zip(("y", "S"), zip(got, eager, exact, strict=True), strict=True):
        assert_close_to_exact(*values, name)


def test_a_measured_plan_that_cannot_serve_is_not_followed():
    """Measured at 16 tokens, asked for 24; measured without dropout; with another layout."""
    x, w, a, b, bias = operands(24, 40, 36, 5, torch.float16)
    seed = torch.tensor(2**40 + 3)
    for args in (
        (x, w, a, b, bias, 1.7, 0.0, None),
        (x[:9], w, a, b, bias, 1.7, 0.5, seed),
        (x.T.contiguous().T, w, a, b, bias, 1.7, 0.0, None),
    ):
        expected = triton.forward(*args, "kext")
        for plan in ("decode", "kext_tma", "of a later version"):
            for got, known in zip(triton.forward(*args, plan), expected, strict=True):
                torch.testing.assert_close(got, known, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("needs_bias_columns", [False, True])
def test_tma_gemm_in_both_directions(monkeypatch, needs_bias_columns):
    """W is read in its stored layout: along K in forward, along N in backward."""
    x, w, a, b, bias = operands(140, 136, 264, 8, torch.float16)
    s, dy = (x @ a.T), torch.randn(140, 264, device=DEVICE).half()
    for source, matrix, p, v in ((x, w.T, s, b.T), (dy, w, dy @ b, a)):
        extra = bias if needs_bias_columns and matrix.shape[1] == 264 else None
        args = source, matrix, p, v, extra, 0.7
        exact = source.double() @ matrix.double() + 0.7 * p.double() @ v.double()
        exact = exact if extra is None else exact + extra.double()
        pointers = triton_products.kext_gemm(*args, tma=False)
        assert_close_to_exact(triton_products.kext_gemm(*args, tma=True), pointers, exact)
        assert_close_to_exact(pointers, exact.half(), exact)


def test_tma_is_chosen_only_where_descriptors_can_describe(monkeypatch):
    x, w, *_ = operands(20, 64, 32, 4, torch.float16)
    assert not triton_products.fits_tma(x, w) or launch.architecture(x.device) >= 90
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    assert triton_products.fits_tma(x, w)
    assert triton.serves("kext_tma", x, w, w[:4])
    assert not triton_products.fits_tma(x.float(), w.float()), "float32"
    assert not triton_products.fits_tma(x, w[:31]), "rows of y that do not start at 16 bytes"
    assert not triton_products.fits_tma(x[:, :63], w[:, :63])
    assert not triton_products.fits_tma(x.T.contiguous().T, w), "a column-major x"
    assert not triton_products.fits_tma(x[:, 1:].contiguous()[:, :32], w[:, :32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    inputs, basis = inputs_on_device((3, 7), dtype=dtype)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["lora_a"] = inputs["lora_a"].repeat_interleave(2, 1)[:, ::2]
    inputs["lora_b"] = inputs["lora_b"].T.contiguous().T
    inputs["bias"] = inputs["bias"].repeat_interleave(3)[::3]
    check_against_exact(inputs, basis, function=linear)
    inputs["bias"] = inputs["bias"][:1].expand(20)
    check_against_exact(inputs, basis, function=linear)
    constant = torch.ones((), device=DEVICE).expand(3, 7, 20)
    check_against_exact(inputs, basis, function=linear, dy=constant)


@pytest.mark.parametrize("m", [0, (2, 0, 3), (), (2, 3)], ids=str)
def test_empty_and_leading_dimensions(m):
    check_against_exact(*inputs_on_device(m), function=linear)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_each_gradient_by_itself(dropout_p):
    """A gradient must not depend on which others are asked for."""
    inputs, basis = inputs_on_device(37)

    def seeded(**leaves):
        torch.manual_seed(3)
        return linear(**leaves, basis=basis, dropout_p=dropout_p)

    exact = {n: t.double() for n, t in inputs.items()}
    _, together = run(seeded, inputs)
    for wanted in (*((n,) for n in inputs), ("x", "lora_a"), ("lora_a", "lora_b")):
        _, alone = run(seeded, inputs, wanted)
        for name in wanted:
            # dS comes from another kernel when dB is not asked for; the sums differ by roundings.
            tolerance = 1e-6 * exact[name].shape[0] * together[name].abs().max().item()
            torch.testing.assert_close(alone[name], together[name], rtol=0, atol=tolerance)


def test_dropout_mask_is_the_same_forward_and_backward():
    inputs, basis = inputs_on_device(67, 40, 36, 5, dtype=torch.float32)
    p, eye = 0.4, torch.eye(40, device=DEVICE)

    def seeded(function, *args, **kwargs):
        torch.manual_seed(5)
        return function(*args, dropout_p=p, **kwargs)

    ones = torch.ones(67, 40, device=DEVICE)
    mask = seeded(linear, ones, torch.zeros_like(eye), eye, eye)
    torch.testing.assert_close(mask.unique().cpu(), torch.tensor([0, 1 / (1 - p)]))

    def masked(x, weight, bias, lora_a, lora_b):
        update = activation_projection(
            x * mask.to(x), torch.zeros_like(weight), lora_a, lora_b, basis=basis.to(x)
        )
        return torch.nn.functional.linear(x, weight, bias) + update

    got = run(functools.partial(seeded, linear, basis=basis), inputs)
    eager = run(masked, inputs)
    exact = run(masked, {n: t.double() for n, t in inputs.items()})
    assert_close_to_exact(got[0], eager[0], exact[0], "y")
    for name in inputs:
        assert_close_to_exact(got[1][name], eager[1][name], exact[1][name], f"d{name}")


def test_dropout_mask_is_random_in_every_direction():
    """Keep rate of rows, columns and neighbouring pairs within five standard deviations."""
    m, k, p = 96, 128, 0.3
    eye = torch.eye(k, device=DEVICE)
    torch.manual_seed(0)
    ones = torch.ones(m, k, device=DEVICE)
    kept = linear(ones, torch.zeros_like(eye), eye, eye, dropout_p=p).cpu() != 0
    for rate, count in (
        (kept.double().mean(), m * k),
        *((row, k) for row in kept.double().mean(1)),
        *((column, m) for column in kept.double().mean(0)),
    ):
        assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    both = (1 - p) ** 2
    for pair in (kept[1:] & kept[:-1], kept[:, 1:] & kept[:, :-1]):
        # Neighbouring pairs share elements, which at most triples the variance.
        spread = 5 * (3 * both * (1 - both) / pair.numel()) ** 0.5
        assert abs(pair.double().mean() - both) < spread
    other = linear(ones, torch.zeros_like(eye), eye, eye, dropout_p=p).cpu() != 0
    agree = (1 - p) ** 2 + p**2
    assert abs((kept == other).double().mean() - agree) < 5 * (agree * (1 - agree) / (m * k)) ** 0.5


def test_dropout_of_everything_and_of_nothing():
    x, w, a, b, bias = operands(21, 40, 24, 4, torch.float32)
    seed = torch.tensor(11)
    y, s = triton.forward(x, w, a, b, bias, 2.0, 1.0, seed)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    assert not s.any()
    assert torch.equal(
        triton.forward(x, w, a, b, bias, 2.0, 0.0, None, "kext")[0],
        triton.forward(x, w, a, b, bias, 2.0, 0.0, seed, "kext")[0],
    )


def test_splits_of_long_sums_change_nothing_but_roundings(monkeypatch):
    x, w, a, b, _ = operands(150, 700, 520, 5, torch.float32)
    dy, s = torch.randn(150, 520, device=DEVICE), x @ a.T
    needs = [True, False, False, True, True]
    exact = reference.backward(*(t.double() for t in (dy, x, w, a, b, s)), 1.5, 0.0, None, needs)
    eager = reference.backward(dy, x, w, a, b, s, 1.5, 0.0, None, needs)
    for processors in (1, 500):
        monkeypatch.setattr(launch, "multiprocessors", lambda device, n=processors: n)
        got = triton.backward(dy, x, w, a, b, s, 1.5, 0.0, None, needs)
        for index, name in ((0, "dx"), (3, "da"), (4, "db")):
            assert_close_to_exact(got[index], eager[index], exact[index], name)
        ds = triton_products.rows_product(dy, b)
        assert_close_to_exact(ds, dy @ b, dy.double() @ b.double(), "dS")


def test_two_runs_agree_bit_by_bit():
    x, w, a, b, bias = operands(150, 136, 264, 8, torch.float16)
    seed, needs = torch.tensor(3), [True, False, True, True, True]

    def both():
        y, s = triton.forward(x, w, a, b, bias, 1.7, 0.2, seed)
        return y, s, *triton.backward(y, x, w, a, b, s, 1.7, 0.2, seed, needs)

    assert all(torch.equal(*pair) for pair in zip(both(), both(), strict=True))


def test_autotuning_times_the_row_of_the_table_once(monkeypatch):
    """The choice is made per kernel and frozen sizes; M is not among them."""
    timed = []
    monkeypatch.setenv("NSRU_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(launch, "_time", lambda configs, run: timed.append(configs) or configs[1])
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda", 0)})()
    first, second = triton_products.CONFIGS["rows"][80]
    key = ("rows", torch.float16, 64, 8)
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is second
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is second
    assert len(timed) == 1
    monkeypatch.delenv("NSRU_AUTOTUNE")
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is first


def test_float64_is_refused_by_name():
    inputs, _ = inputs_on_device(dtype=torch.float64)
    with pytest.raises(nk.BackendUnavailable, match=r"float32, bf16 and fp16, got torch.float64"):
        linear(**inputs, basis=None)


def test_gradient_checkpointing_and_autocast():
    inputs, basis = inputs_on_device(9)
    direct = run(functools.partial(linear, basis=basis), inputs)

    def again(**leaves):
        return checkpoint(functools.partial(linear, basis=basis), use_reentrant=False, **leaves)

    recomputed = run(again, inputs)
    for name in inputs:
        assert torch.equal(direct[1][name], recomputed[1][name])
    with torch.autocast(DEVICE, torch.float16):
        y = linear(**inputs, basis=basis)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), direct[0], rtol=1e-2, atol=1e-2)


def test_in_one_compiled_graph():
    inputs, basis = inputs_on_device(9)
    function = functools.partial(linear, basis=basis)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, grads = run(compiled, inputs)
    expected, expected_grads = run(function, inputs)
    torch.testing.assert_close(y, expected)
    for name in inputs:
        torch.testing.assert_close(grads[name], expected_grads[name])


# Real sizes: (M, K, N, R), the shapes of peers.md, decode, and rows beyond 2^31 elements.
REAL = [
    (8192, 4096, 4096, 16),
    (4096, 4096, 14336, 16),
    (16384, 2048, 8192, 16),
    (1, 4096, 4096, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape, dtype):
    m, k, n, r = shape
    check_against_exact(*inputs_on_device(m, k, n, r, 256, dtype=dtype), function=linear)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", triton.PLANS[1:])
def test_real_plans_repeat_bit_by_bit(plan):
    args = operands(8192, 4096, 4096, 16, torch.bfloat16)
    first, second = (triton.forward(*args, 2.0, 0.0, None, plan) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    exact = reference.forward(*(t.double() for t in args), 2.0, 0.0, None)
    eager = reference.forward(*args, 2.0, 0.0, None)
    assert_close_to_exact(first[0], eager[0], exact[0], plan)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    m, k = 2**31 // 4096 + 256, 4096
    x, w, a, b, bias = operands(1, k, 64, 16, torch.bfloat16)
    x = x.expand(m, k).contiguous()
    x[-1] *= 2
    dy = torch.ones(m, 64, device=DEVICE, dtype=torch.bfloat16)
    y, s = triton.forward(x, w, a, b, bias, 1.0, 0.0, None)
    head, head_s = triton.forward(x[-200:].clone(), w, a, b, bias, 1.0, 0.0, None)
    assert torch.equal(y[-200:], head)
    assert torch.equal(s[-200:], head_s)
    needs = [True, False, False, True, True]
    dx, _, _, da, _ = triton.backward(dy, x, w, a, b, s, 1.0, 0.0, None, needs)
    assert dx.isfinite().all()
    exact = (dy[0].double() @ b.double())[:, None] * x.double().sum(0, keepdim=True)
    assert_close_to_exact(da, exact.to(da.dtype), exact)


@pytest.mark.gpu
def test_cuda_graph_replays_the_same_step():
    x, w, a, b, bias = operands(512, 1024, 1024, 16, torch.bfloat16)

    def step():
        y, s = triton.forward(x, w, a, b, bias, 2.0, 0.0, None)
        return y, *triton.backward(
            y, x, w, a, b, s, 2.0, 0.0, None, [True, False, False, True, True]
        )

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for output in outputs:
        output.zero_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
