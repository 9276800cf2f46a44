"""The Triton kernels of projected linears: interpreted on a CPU, run on a GPU if there is one.

bf16 is left to GPUs: the interpreter multiplies it wrongly without a word.
"""

import functools

import pytest
import torch
from linear_cases import (
    DEVICE,
    GROUP,
    ONE,
    activation_projection,
    adapters_and_x,
    check_against_exact,
    check_backward,
    check_both_passes,
    check_forward,
    check_some_gradients,
    make_inputs,
    operands,
    run,
    upstream,
)
from tolerance import assert_close_to_exact
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.dispatch import launch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from nsru_kernels.ops.linear import triton, triton_products

DTYPES = [torch.float32, torch.float16]
# (M, K, N_i, R_i): tokens for one and several row blocks, sizes below, at and beyond a tile.
CASES = [
    (1, 24, (20,), (4,)),
    (16, 64, (32,), (16,)),
    (63, 130, (70,), (17,)),
    (130, 72, (264,), (3,)),
    (70, 33, (29,), (70,)),
    (1, 24, (20, 7), (4, 3)),
    (70, 72, (136, 40, 40), (8, 8, 8)),
    (33, 33, (29, 65, 17, 12), (2, 17, 1, 5)),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")
linear = functools.partial(nk.nsru_linear, backend="triton")


def inputs_on_device(*args, **kwargs):
    inputs, basis = make_inputs(*args, **kwargs)
    return {n: t.to(DEVICE) for n, t in inputs.items()}, None if basis is None else basis.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient(case, dtype):
    check_both_passes(triton, case, dtype)


@pytest.mark.parametrize("unused", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 8, 9, 10), (8,)], ids=str)
def test_unused_outputs_and_single_gradients(unused, wanted):
    case = (20, 40, (24, 9, 16), (3, 2, 4))
    check_some_gradients(triton, case, torch.float32, unused, wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_group_gives_what_its_linears_give(dropout_p):
    """Also with dropout: one mask of x for all."""
    x, ws, a, bs, biases, scalings = operands(37, 40, (24, 9, 16), (3, 2, 4), torch.float32)
    seed = torch.tensor(2**40 + 5)
    ys, s = triton.forward(x, ws, a, bs, biases, scalings, dropout_p, seed)
    dys = upstream(ys)
    needs = [True] * 11
    dx, da, *rest = triton.backward(dys, x, ws, a, bs, s, scalings, dropout_p, seed, needs)
    alone = []
    for i, part in enumerate(a.split([3, 2, 4])):
        own = [ws[i]], part, [bs[i]]
        (y,), s = triton.forward(x, *own, [biases[i]], [scalings[i]], dropout_p, seed)
        torch.testing.assert_close(ys[i], y)
        last = s, [scalings[i]], dropout_p, seed, [True] * 5
        alone.append(triton.backward([dys[i]], x, *own, *last))
    dxs, das, *others = zip(*alone, strict=True)
    torch.testing.assert_close(dx, sum(dxs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(da, torch.cat(das), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest, [grad for grads in others for grad in grads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", triton.PLANS)
@pytest.mark.parametrize(
    "case",
    [
        (5, 40, (24,), (3,)),
        (16, 136, (72,), (8,)),
        (140, 136, (264,), (8,)),
        (9, 40, (24, 9, 16), (3, 2, 4)),
        (40, 136, (72, 40), (8, 16)),
    ],
    ids=str,
)
def test_every_plan_gives_the_same_forward(case, plan, dtype):
    if plan == "decode" and case[0] > triton.DECODE_TOKENS:
        pytest.skip("decode is for few tokens")
    if plan == "kext_tma" and dtype == torch.float32:
        pytest.skip("TMA serves 16-bit operands")
    check_forward(triton, operands(*case, dtype), plan=plan)


@pytest.mark.parametrize("case", [(40, 136, (72,), (8,)), (40, 72, (24, 9), (3, 2))], ids=str)
@pytest.mark.parametrize("plan", ["expand_first", "kext 64x64x32g8w4s3", "kext of a later version"])
def test_every_plan_gives_the_same_backward(case, plan):
    check_backward(triton, operands(*case, torch.float32), plan=plan)
    check_backward(triton, operands(*case, torch.float32), plan=plan, unused=(0,))


@pytest.mark.parametrize("ns", [(36,), (36, 20)], ids=str)
def test_a_measured_plan_that_cannot_serve_is_not_followed(ns):
    """Measured at 16 tokens, asked for 24; measured without dropout; with another layout."""
    whole, *others = operands(24, 40, ns, (5, 3)[: len(ns)], torch.float16)
    for x, *dropout in (
        (whole, 0.0, None),
        (whole[:9], 0.5, torch.tensor(2**40 + 3)),
        (whole.T.contiguous().T, 0.0, None),
    ):
        expected = triton.forward(x, *others, *dropout, "kext")
        for plan in ("decode", "kext_tma", "of a later version"):
            got = triton.forward(x, *others, *dropout, plan)
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_sums_over_tokens_may_be_beyond_fp16():
    """At 16384 tokens dĀ was infinite, and no number once projected."""
    x, w, b, dy = (
        torch.full(shape, value, dtype=torch.float16, device=DEVICE)
        for shape, value in (((64, 16), 100.0), ((8, 16), 0.0), ((8, 4), 1.0), ((64, 8), 4.0))
    )
    s = x.new_full((64, 4), 1000.0)
    args = [dy], x, [w], x[:4], [b], s, [1.0], 0.0, None, adapters_and_x(1)
    _, da, *_, db = triton.backward(*args)
    assert torch.equal(da, torch.full_like(da, 64 * 32 * 100.0))
    assert torch.equal(db, torch.full_like(db, 64 * 4 * 1000.0))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [(8,), (32,), (8, 8), (17, 17), (30, 20, 20)], ids=str)
@pytest.mark.parametrize("row", [80, 90])
def test_one_gemm_of_several_sources(row, ranks, dropout_p, monkeypatch):
    """By pointers and by TMA, with the tiles of two architectures. W is read in its stored layout:
    along K in forward, along N in backward."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "architecture", lambda device: row)
    count = len(ranks)
    x, ws, a, bs, _, _ = operands(140, 72, (264, 136, 8)[:count], ranks, torch.float16)
    dys = upstream([x @ w.T for w in ws])
    ds = torch.cat([dy @ b for dy, b in zip(dys, bs, strict=True)], dim=1)
    products = [(dys, ws, ds, a)]
    if count == 1:
        products.append(([x], [ws[0].T], x @ a.T, bs[0].T))
    for xs, matrices, p, v in products:
        dropout, mask = (dropout_p, torch.tensor(2**40 + 7)), 1.0
        if dropout_p:
            ones = torch.ones_like(p[:, :1]), torch.ones_like(v[:1]), None, 1.0
            nothing = [torch.zeros_like(xs[0])], matrices[:1]
            mask = triton_products.kext_gemm(*nothing, *ones, *dropout, tma=False).double()
            torch.testing.assert_close(mask, (mask > 0).double() / (1 - dropout_p))
            assert 0 < (mask > 0).double().mean() < 1
        bias = torch.randn(v.shape[1], device=DEVICE).half()
        exact = 0.7 * mask * (p.double() @ v.double())
        exact += sum(x.double() @ w.double() for x, w in zip(xs, matrices, strict=True))
        exact += bias.double()
        args = xs, matrices, p, v, bias, 0.7, *dropout
        pointers = triton_products.kext_gemm(*args, tma=False)
        assert_close_to_exact(triton_products.kext_gemm(*args, tma=True), pointers, exact)
        assert_close_to_exact(pointers, exact.half(), exact)


def test_tma_is_chosen_only_where_descriptors_can_describe(monkeypatch):
    x, (w, other), _, bs, *_ = operands(20, 64, (32, 16), (4, 4), torch.float16)
    assert not triton_products.fits_tma(x, w) or launch.architecture(x.device) >= 90
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    assert triton_products.fits_tma(x, w)
    assert triton.serves("kext_tma", x, [w, other], bs)
    assert not triton.serves("kext_tma", x, [w, other[:15]], bs), "one of them does not fit"
    assert not triton_products.fits_tma(x.float(), w.float()), "float32"
    assert not triton_products.fits_tma(x, w[:31]), "rows of y that do not start at 16 bytes"
    assert not triton_products.fits_tma(x[:, :63], w[:, :63])
    assert not triton_products.fits_tma(x.T.contiguous().T, w), "a column-major x"
    assert not triton_products.fits_tma(x[:, 1:].contiguous()[:, :32], w[:, :32])


@pytest.mark.parametrize("reduce", [
    lambda y: y.sum(0).square().sum(),
    lambda y: y.mean(0).square().sum(),
    lambda y: y.mean(),
    lambda y: y.sum(1).square().sum(),
    lambda y: (y[:, :1].expand(-1, 32) * y.sum()).sum(),
])  # fmt: skip
def test_gradients_as_autograd_makes_them_are_described_or_read_by_pointers(reduce, monkeypatch):
    """dY of ``y.sum(0)`` has strides (0, 1), which no descriptor can hold."""
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    made = []
    describe = triton_products.TensorDescriptor.from_tensor

    def from_tensor(tensor, blocks):
        made.append(tensor)
        return describe(tensor, blocks)

    monkeypatch.setattr(triton_products.TensorDescriptor, "from_tensor", from_tensor)
    inputs, _ = inputs_on_device(20, 64, 32, 4, dtype=torch.float16)
    x = inputs["x"].requires_grad_()
    got, expected = (
        torch.autograd.grad(reduce(nk.nsru_linear(**inputs, backend=backend)), x)[0]
        for backend in ("triton", "eager")
    )
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    assert made, "the forward is described"
    assert all(t.stride(0) >= t.shape[1] and t.stride(1) == 1 for t in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    inputs, basis = inputs_on_device((3, 7), dtype=dtype)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["lora_a"] = inputs["lora_a"].repeat_interleave(2, 1)[:, ::2]
    inputs["lora_b"] = inputs["lora_b"].T.contiguous().T
    inputs["bias"] = inputs["bias"].repeat_interleave(3)[::3]
    check_against_exact(inputs, basis, backend="triton")
    inputs["bias"] = inputs["bias"][:1].expand(20)
    check_against_exact(inputs, basis, backend="triton")
    constant = torch.ones((), device=DEVICE).expand(3, 7, 20)
    check_against_exact(inputs, basis, backend="triton", dys=[constant])


@pytest.mark.parametrize("sizes", [ONE, GROUP], ids=["one", "group"])
@pytest.mark.parametrize("m", [0, (2, 0, 3), (), (2, 3)], ids=str)
def test_empty_and_leading_dimensions(m, sizes):
    check_against_exact(*inputs_on_device(m, **sizes), backend="triton")


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
    x, (w,), a, bs, (bias,), scalings = operands(21, 40, (24,), (4,), torch.float32)
    seed, args = torch.tensor(11), ([w], a, bs, [bias], scalings)
    (y,), s = triton.forward(x, *args, 1.0, seed)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    assert not s.any()
    (one,), (other,) = (triton.forward(x, *args, 0.0, s, "kext")[0] for s in (None, seed))
    assert torch.equal(one, other)


def test_splits_of_long_sums_change_nothing_but_roundings(monkeypatch):
    args = operands(150, 300, (260,), (5,), torch.float32)
    (b,), (dy,) = args[3], upstream([torch.empty(150, 260, device=DEVICE)])
    for processors in (1, 500):
        monkeypatch.setattr(launch, "multiprocessors", lambda device, n=processors: n)
        check_backward(triton, args, needs=adapters_and_x(1), dys=[dy])
        ds = triton_products.shrink(dy, b)
        assert_close_to_exact(ds, dy @ b, dy.double() @ b.double(), "dS")


def test_autotuning_times_the_row_of_the_table_once(monkeypatch):
    """The choice is made per kernel and frozen sizes; M is not among them."""
    timed = []
    monkeypatch.setenv("NSRU_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(launch, "_time", lambda configs, run: timed.append(configs) or configs[1])
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda", 0)})()
    first, second = triton_products.CONFIGS["shrink"][80]
    key = ("shrink", torch.float16, 64, 8)
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is second
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is second
    assert len(timed) == 1
    monkeypatch.delenv("NSRU_AUTOTUNE")
    assert launch.tuned((first, second), key, on_gpu, lambda config: config) is first


def test_float64_is_refused_by_name():
    inputs, _ = inputs_on_device(dtype=torch.float64)
    with pytest.raises(nk.BackendUnavailable, match=r"bfloat16, float16, float32, got .*float64"):
        linear(**inputs, basis=None)
    for ns, name in (((4,), "nsru_linear"), ((4, 6), "nsru_linear_group")):
        args = operands(3, 5, ns, (2, 2)[: len(ns)], torch.float64)
        reason = rf"serve {name}: kernels take float32, bf16 and fp16, got torch.float64"
        with pytest.raises(nk.BackendUnavailable, match=reason):
            triton.forward(*args)


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


# Real sizes: single linears, decode, q/k/v and gate/up of Llama layers.
REAL = [
    (8192, 4096, (4096,), (16,)),
    (4096, 4096, (14336,), (16,)),
    (16384, 2048, (8192,), (16,)),
    (1, 4096, (4096,), (16,)),
    (1, 4096, (4096, 1024, 1024), (16, 16, 16)),
    (8192, 4096, (4096, 1024, 1024), (16, 16, 16)),
    (8192, 4096, (14336, 14336), (16, 16)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_sizes(case, dtype):
    m, k, ns, ranks = case
    sizes = (ns[0], ranks[0]) if len(ns) == 1 else (ns, ranks)
    check_against_exact(*inputs_on_device(m, k, *sizes, 256, dtype=dtype), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [REAL[0], *REAL[-2:]], ids=str)
def test_real_passes_repeat_bit_by_bit(case):
    args = operands(*case, torch.bfloat16)
    x, ws, a, bs, _, scalings = args
    for plan in triton.PLANS[1:]:
        check_forward(triton, args, plan=plan)
        (ys, s), (again, s_again) = (triton.forward(*args, plan=plan) for _ in range(2))
        assert all(map(torch.equal, (*ys, s), (*again, s_again)))
    check_backward(triton, args, needs=adapters_and_x(len(ws)))
    back = upstream(ys), x, ws, a, bs, s, scalings, 0.0, None, adapters_and_x(len(ws))
    first, second = (triton.backward(*back) for _ in range(2))
    assert all(
        one is other or torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    torch.cuda.reset_peak_memory_stats()
    m, k = 2**31 // 4096 + 256, 4096
    x, (w,), a, (b,), (bias,), _ = operands(1, k, (64,), (16,), torch.bfloat16)
    row = x.double()
    x = x.expand(m, k).contiguous()  # 4.4 GB, as much as dX: little enough beside other workers
    x[-1] *= 2
    dy = torch.ones(m, 64, device=DEVICE, dtype=torch.bfloat16)
    args = [w], a, [b], [bias], [1.0]
    (y,), s = triton.forward(x, *args)
    (head,), head_s = triton.forward(x[-200:].clone(), *args)
    assert torch.equal(y[-200:], head)
    assert torch.equal(s[-200:], head_s)
    back = [dy], x, [w], a, [b], s, [1.0], 0.0, None, adapters_and_x(1)
    dx, da, *_ = triton.backward(*back)
    assert torch.equal(dx[-200:], dx[:200]), "all rows of dY are equal"
    assert dx[-1].isfinite().all()
    exact = (dy[0].double() @ b.double())[:, None] * (m + 1) * row
    assert_close_to_exact(da, exact.to(da.dtype), exact)
    assert torch.cuda.max_memory_allocated() < 12e9


@pytest.mark.gpu
@pytest.mark.parametrize("ns", [(1024,), (1024, 256, 256)], ids=str)
def test_cuda_graph_replays_the_same_step(ns):
    args = operands(512, 1024, ns, (16,) * len(ns), torch.bfloat16)
    x, ws, a, bs, _, scalings = args

    def step():
        ys, s = triton.forward(*args)
        needs = adapters_and_x(len(ns))
        grads = triton.backward(ys, x, ws, a, bs, s, scalings, 0.0, None, needs)
        return *ys, *(grad for grad in grads if grad is not None)

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for output in outputs:
        output.zero_()
    graph.replay()
    assert all(map(torch.equal, outputs, expected))
