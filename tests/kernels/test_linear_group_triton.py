"""The Triton kernels of siblings: interpreted on a CPU, run on a GPU if there is one."""

import pytest
import torch
from group_cases import (
    DEVICE,
    check_both_passes,
    check_some_gradients,
    compare,
    operands,
    upstream,
    wide,
)
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels.ops.linear_group import reference

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from nsru_kernels.ops.linear import triton_products
from nsru_kernels.ops.linear_group import triton

DTYPES = [torch.float32, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


CASES = [
    (1, 24, (20, 7), (4, 3)),
    (70, 72, (136, 40, 40), (8, 8, 8)),
    (33, 33, (29, 65, 17, 12), (2, 17, 1, 5)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient(case, dtype):
    check_both_passes(triton, case, dtype)


@pytest.mark.parametrize("unused", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 8, 9, 10), (8,)], ids=str)
def test_unused_outputs_and_single_gradients(unused, wanted):
    case = (20, 40, (24, 9, 16), (3, 2, 4))
    check_some_gradients(triton, case, torch.float32, unused, wanted)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sum_of_products_by_tma_equals_pointers(count):
    x, ws, a, bs, _, _ = operands(140, 72, (264, 136, 8)[:count], (8, 8, 8)[:count], torch.float16)
    dys = upstream([x @ w.T for w in ws])
    ds = torch.cat([dy @ b for dy, b in zip(dys, bs, strict=True)], dim=1)
    exact = sum(dy.double() @ w.double() for dy, w in zip(dys, ws, strict=True))
    exact = exact + ds.double() @ a.double()
    pointers = triton_products.kext_group_gemm(dys, ws, ds, a, tma=False)
    assert_close_to_exact(pointers, exact.half(), exact)
    descriptors = triton_products.kext_group_gemm(dys, ws, ds, a, tma=True)
    assert_close_to_exact(descriptors, pointers, exact)


def test_through_the_public_function():
    x, ws, a, bs, biases, scalings = operands(9, 40, (24, 9, 16), (3, 2, 4), torch.float32)
    basis = torch.linalg.qr(torch.randn(40, 6))[0].to(DEVICE)
    results = []
    for backend, dtype in (("triton", None), ("eager", None), ("eager", torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype) for t in (x, *a.split([3, 2, 4]), *bs)]
        frozen = [[None if t is None else t.to(leaves[0]) for t in ts] for ts in (ws, biases)]
        for leaf in leaves:
            leaf.requires_grad_()
        ys = nk.nsru_linear_group(
            leaves[0], frozen[0], leaves[1:4], leaves[4:], basis.to(leaves[0]), frozen[1],
            scalings=scalings, backend=backend,
        )  # fmt: skip
        results.append((*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)))
    compare(*results, [str(i) for i in range(10)])


@pytest.mark.gpu
def test_cuda_graph_replays_the_same_step():
    args = operands(512, 1024, (1024, 256, 256), (16, 16, 16), torch.bfloat16)
    x, ws, a, bs, _, scalings = args
    needs = [True, True, *[False] * 6, *[True] * 3]

    def step():
        ys, s = triton.forward(*args)
        back = triton.backward(ys, x, ws, a, bs, s, scalings, needs)
        return *ys, *(grad for grad in back if grad.numel())

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for output in outputs:
        output.zero_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("ns", [(4096, 1024, 1024), (14336, 14336)], ids=str)
def test_real_sizes_in_bf16_repeat_bit_by_bit(ns):
    args = operands(8192, 4096, ns, (16,) * len(ns), torch.bfloat16)
    x, ws, a, bs, _, scalings = args
    ys, s = triton.forward(*args)
    exact_ys, _ = reference.forward(*wide(list(args)))
    eager_ys, _ = reference.forward(*args)
    compare(ys, eager_ys, exact_ys, [f"y{i}" for i in range(len(ns))])
    needs = [True, True, *[False] * (2 * len(ns)), *[True] * len(ns)]
    back = (upstream(ys), x, ws, a, bs, s, scalings)
    got, again = triton.backward(*back, needs), triton.backward(*back, needs)
    assert all(torch.equal(*pair) for pair in zip(got, again, strict=True))
    compare(
        got, reference.backward(*back, needs), reference.backward(*wide(list(back)), needs),
        [str(i) for i in range(len(needs))],
    )  # fmt: skip
