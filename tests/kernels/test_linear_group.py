"""What only several linears have in common: unused outputs, one graph, bad input with its index."""

import functools

import pytest
import torch
from linear_cases import (
    DEVICE,
    GROUP,
    check_against_exact,
    linears,
    make_inputs,
    one_by_one,
    opcheck,
    operands,
    run,
)

import nsru_kernels as nk
from nsru_kernels.ops.products import rank_columns


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_outputs_that_nobody_uses(used):
    check_against_exact(*make_inputs((2, 3), **GROUP), used=used)


def test_a_group_gives_what_its_linears_give():
    """With a basis in bf16 and without any bias."""
    inputs, basis = make_inputs(**GROUP)
    inputs = {name: t for name, t in inputs.items() if not name.startswith("bias")}
    got, want = (
        run(functools.partial(function, basis=basis.bfloat16()), inputs)
        for function in (linears, functools.partial(one_by_one, nk.nsru_linear))
    )
    torch.testing.assert_close(got, want)


def test_outputs_may_be_edited_in_place_like_those_of_a_linear():
    for m in (4, (2, 3)):
        inputs, basis = make_inputs(m, **GROUP)
        inputs["x"].requires_grad_()
        q, k, _ = linears(**inputs, basis=basis)
        torch.relu_(q).sum().backward(retain_graph=True)
        k.mul_(2).sum().backward()
        single, basis = make_inputs(m)
        single["x"].requires_grad_()
        torch.relu_(nk.nsru_linear(**single, basis=basis)).sum().backward()


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_compiled_graph_gives_the_eager_result(dtype, used):
    torch._dynamo.reset()
    inputs, basis = make_inputs((2, 5), dtype=dtype, **GROUP)

    def some(**inputs):
        ys = linears(**inputs, basis=basis)
        return [ys[i] for i in used]

    compiled = torch.compile(some, fullgraph=True, backend="aot_eager")
    got, want = (run(f, inputs) for f in (compiled, some))
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, grad in want[1].items():
        # A compiled graph may hand out zeros where eager hands out None.
        found, expected = (
            torch.zeros_like(inputs[name]) if g is None else g for g in (got[1][name], grad)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("m", [5, 0])
def test_opcheck(m):
    x, weights, a, bs, biases, scalings = operands(m, 24, *GROUP.values(), torch.float32)
    x = x.T.contiguous().T
    args = (x, weights, a, bs, biases, scalings, 0.0, None, "auto")
    opcheck(torch.ops.nsru.linear_forward, args)
    s = torch.randn(m, a.shape[0], device=DEVICE)
    dys = [torch.randn(n, m, device=DEVICE).T for n in GROUP["n"]]
    for dy, needs in (
        (dys, [True] * 11),
        ([dys[0], None, dys[2]], [True] * 11),
        (dys, [False, True] + [False] * 6 + [True, False, True]),
    ):
        args = (dy, x, weights, a, bs, s, scalings, 0.0, None, needs, "auto")
        opcheck(torch.ops.nsru.linear_backward, args)


def test_the_parts_of_s_belong_to_their_linears():
    s = torch.arange(9.0).expand(2, 9)
    parts = rank_columns(s, [torch.ones(5, r) for r in GROUP["r"]])
    assert [part[0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


BAD = {
    "no weights": ({"weights": []}, "weights must hold at least one matrix, got none"),
    "scalings": ({"scalings": [1.0]}, r"scalings must hold one entry per weight \(2\), got 1"),
    "biases": ({"biases": [None] * 3}, r"biases must hold one entry per weight \(2\), got 3"),
    "lora_as": ({"lora_as": [torch.ones(2, 5)]}, r"lora_as must hold one entry .*\(2\), got 1"),
    "x": ({"x": torch.ones(3, 4)}, r"index 0: x must be \[\.\.\., K=5\].*got \(3, 4\)"),
    "x dtype": ({"x": torch.ones(3, 5).half()}, r"index 0: x \(torch.float16\) and weight"),
    "another K": (
        {"weights": [torch.ones(6, 5), torch.ones(7, 4)]},
        r"index 1: x must be \[\.\.\., K=4\].*got \(3, 5\)",
    ),
    "lora_a": (
        {"lora_as": [torch.ones(2, 5), torch.ones(3, 4)]},
        r"index 1: lora_a must be \[R ≥ 1, K=5\].*got \(3, 4\)",
    ),
    "lora_b": (
        {"lora_bs": [torch.ones(6, 2), torch.ones(3, 7)]},
        r"index 1: lora_b must be .*\[N=7, R=3\].*got \(3, 7\)",
    ),
    "bias": ({"biases": [None, torch.ones(6)]}, r"index 1: bias must be \[N=7\].*got \(6,\)"),
    "basis": ({"basis": torch.ones(4, 2)}, r"index 0: basis must be .*\[K=5, Q\].*got \(4, 2\)"),
    "backend": ({"backend": "gpu"}, "backend must be 'auto' or one of .*got 'gpu'"),
    "device": ({"x": torch.ones(3, 5, device="meta")}, "index 0: x is on meta, weight on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_and_index(case):
    change, message = BAD[case]
    arguments = {
        "x": torch.ones(3, 5),
        "weights": [torch.ones(6, 5), torch.ones(7, 5)],
        "lora_as": [torch.ones(2, 5), torch.ones(3, 5)],
        "lora_bs": [torch.ones(6, 2), torch.ones(7, 3)],
        "scalings": [1.0, 2.0],
    }
    with pytest.raises(ValueError, match=message):
        nk.nsru_linear_group(**{**arguments, **change})
