"""Siblings in the CUDA backend: its own kernels emulated, a stand-in for CUTLASS's GEMM."""

import pytest
import torch
from linear_cases import (
    DEVICE,
    adapters_and_x,
    check_both_passes,
    check_some_gradients,
    operands,
    upstream,
)

import nsru_kernels as nk
from nsru_kernels.dispatch import extension
from nsru_kernels.ops.linear import cuda

DTYPES = [torch.bfloat16, torch.float16]
# Ranks that need padded copies and ranks that do not; one above those that share a read of dY.
CASES = [
    (1, 24, (24, 8), (4, 3)),
    (70, 72, (136, 40, 40), (8, 8, 8)),
    (33, 40, (32, 64, 16, 8), (2, 40, 1, 5)),
]


@pytest.fixture
def kernels(request):
    """Kernels that take the tensors of these tests."""
    if DEVICE == "cpu":
        request.getfixturevalue("stand_in")
    elif reason := extension.unavailable(torch.device(DEVICE)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient(kernels, case, dtype):
    check_both_passes(cuda, case, dtype)


@pytest.mark.parametrize("unused", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 8, 9, 10), (8,)], ids=str)
def test_unused_outputs_and_single_gradients(kernels, unused, wanted):
    case = (20, 40, (24, 8, 16), (3, 2, 4))
    check_some_gradients(cuda, case, torch.float16, unused, wanted)


def test_swapped_siblings_go_through_cuda_alone(stand_in, serves_the_cpu, monkeypatch):
    """A model with siblings under NSRU_BACKEND=cuda: no op of it is missing."""
    monkeypatch.setenv("NSRU_BACKEND", "cuda")

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = torch.nn.Linear(32, 24), torch.nn.Linear(32, 16)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x)], -1)

    model = Attention().bfloat16()
    basis = torch.linalg.qr(torch.randn(32, 5))[0].contiguous()
    x, subspaces = torch.randn(9, 32).bfloat16(), {"q": basis, "k": basis}
    report = nk.swap_linears(
        model, ["q", "k"], rank=3, alpha=6, subspaces=subspaces, batch={"x": x}
    )
    for parameter in (model.q.lora_B, model.k.lora_B):
        torch.nn.init.normal_(parameter)
    for _ in range(3):
        model(x).square().sum().backward()
    assert "q+k × 1 computed together" in str(report)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [parameter.grad.clone() for parameter in adapters]
    y = model(x)
    monkeypatch.setenv("NSRU_BACKEND", "eager")
    model.zero_grad()
    for _ in range(3):
        model(x).square().sum().backward()
    torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02)
    for got, want in zip(grads, (parameter.grad for parameter in adapters), strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())


def test_refusals_name_the_reason_and_the_other_backend():
    args = operands(8, 40, (24, 9), (3, 2), torch.bfloat16)
    with pytest.raises(nk.BackendUnavailable, match=r"nsru_linear_group.*\(9, 40\).*'triton'"):
        cuda.forward(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_sizes(kernels, dtype):
    check_both_passes(cuda, (8192, 4096, (4096, 1024, 1024), (16, 16, 16)), dtype)


@pytest.mark.gpu
def test_two_runs_agree_bit_by_bit(kernels):
    args = operands(8192, 2048, (2048, 512, 512), (16, 16, 16), torch.bfloat16)
    x, ws, a, bs, _, scalings = args
    runs = []
    for _ in range(2):
        ys, s = cuda.forward(*args)
        back = upstream(ys), x, ws, a, bs, s, scalings, 0.0, None, adapters_and_x(3)
        runs.append([*ys, s, *(grad for grad in cuda.backward(*back) if grad is not None)])
    assert all(map(torch.equal, *runs))
