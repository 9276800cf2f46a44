"""Float32 products are what they say, whichever way a user allowed TF32 or bf16 inside them."""

import pytest
import torch
from linear_cases import make_basis
from torch.utils._python_dispatch import TorchDispatchMode

import nsru_kernels as nk
from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.precision import float32_precision, full_float32
from nsru_kernels.ops.sketch import update_sketch

HAS_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")
    if HAS_NEW:
        for settings in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            settings.fp32_precision = "none"


def allow(way):
    if way.startswith("new") and not HAS_NEW:
        pytest.skip("this PyTorch has no fp32_precision")
    match way:
        case "new, matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        case "new, everywhere":  # as transformers' enable_tf32 does
            torch.backends.fp32_precision = "tf32"
        case "old":
            torch.backends.cuda.matmul.allow_tf32 = True
        case "medium":
            torch.set_float32_matmul_precision("medium")


WAYS = ("new, matmul", "new, everywhere", "old", "medium")


@pytest.mark.parametrize("way", WAYS)
def test_kernels_read_what_is_in_force(way):
    assert launch.dot_precision(torch.float32) == "tf32x3"
    allow(way)
    assert launch.dot_precision(torch.float32) == "tf32"
    assert launch.dot_precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("way", WAYS)
def test_a_block_in_full_float32_leaves_everything_as_it_was(way):
    allow(way)
    with full_float32(torch.device("cuda")):
        assert float32_precision("cuda") == "ieee"
    assert float32_precision("cuda") == "tf32"
    if way == "new, everywhere":
        torch.backends.fp32_precision = "ieee"
        assert float32_precision("cuda") == "ieee", "still follows what holds for all devices"


class Lowering(TorchDispatchMode):
    """Library products of float32 matrices as a device with TF32 or bf16 units has them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if (
            packet in products
            and args[-1].dtype == torch.float32
            and (float32_precision(args[-1].device.type) != "ieee")
        ):
            args = (*args[:-2], *(t.bfloat16().float() for t in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def lowered(request):
    """A device whose float32 products are lowered."""
    if request.param == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        yield torch.device("cuda")
        return
    torch.set_float32_matmul_precision("medium")
    with Lowering():
        a = torch.randn(64, 64)
        assert (a @ a - (a.double() @ a.double())).abs().max() > 1e-3, "products are lowered here"
        yield torch.device("cpu")


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_projection_leaks_nothing(lowered, basis_dtype):
    a, basis = torch.randn(16, 1024), make_basis(1024, 64).to(basis_dtype)
    a, basis = a.to(lowered), basis.to(lowered)
    many = nk.project_adapters([a, a], [basis, basis], backend="eager")
    for projected in (nk.project_adapter(a, basis, backend="eager"), *many):
        assert (projected.double() @ basis.double()).norm() / a.norm() <= 1e-6


def test_the_sketch_of_float32_activations_is_exact(lowered):
    x, omega = torch.randn(40, 32, device=lowered), torch.randn(32, 8, device=lowered)
    y, h = torch.zeros(32, 8, device=lowered), torch.zeros(8, 8, device=lowered)
    update_sketch(x, omega, y, h, backend="eager")
    s = x.double() @ omega.double()
    torch.testing.assert_close(y.double(), x.double().T @ s, rtol=1e-5, atol=1e-4)
    sketch = nk.RetainSketch(32, 32, device=lowered)
    sketch.update(x)
    torch.testing.assert_close(sketch.moment(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_a_merged_weight_is_summed_in_float32(lowered):
    layer = nk.NSRULinear(64, 48, 8, alpha=16).to(lowered)
    torch.nn.init.normal_(layer.lora_B)
    exact = 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer.delta_weight().double(), exact, rtol=1e-5, atol=1e-5)
