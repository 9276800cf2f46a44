"""Inputs of projected linears, one or several that share x, and what they are compared with."""

import functools
import re

import torch
import torch.nn.functional as F
from tolerance import assert_close_to_exact
from torch import Tensor

import nsru_kernels as nk
from nsru_kernels.ops.linear import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = ("x", "weight", "bias", "lora_a", "lora_b")
SCALINGS = (1.7, 0.5, 3.0, 0.9)
# Sizes for ``make_inputs``.
ONE, GROUP = {}, {"n": (20, 7, 13), "r": (4, 3, 2)}


# ---------------------------------------------------------------- by the public functions


def make_inputs(m=7, k=24, n=20, r=4, q=6, *, dtype=torch.float32, adapter=None, seed=0):
    """({x, weight, bias, lora_a, lora_b}, orthonormal basis or None); ``m`` may be a shape.

    Tuples n and r make a group, {x, weight0, bias0, …, weight1, …}, the second without a bias;
    ``adapter`` may be a tuple then as well.
    """
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    several = isinstance(n, tuple)
    sizes = zip(n, r, strict=True) if several else [(n, r)]
    lead = (m,) if isinstance(m, int) else m
    inputs = {"x": draw(*lead, k).to(dtype)}
    for i, (n_i, r_i) in enumerate(sizes):
        suffix = str(i) if several else ""
        own = adapter[i] if isinstance(adapter, tuple) else adapter or wide
        inputs["weight" + suffix] = (draw(n_i, k) / k**0.5).to(dtype)
        if i != 1:
            inputs["bias" + suffix] = draw(n_i).to(dtype)
        inputs["lora_a" + suffix] = (draw(r_i, k) / k**0.5).to(own)
        inputs["lora_b" + suffix] = draw(n_i, r_i).to(own)
    return inputs, make_basis(k, q, seed).to(wide) if q else None


def make_basis(k, q, seed=0):
    """[K, Q] with orthonormal columns, float64."""
    g = torch.Generator().manual_seed(seed + 1)
    return torch.linalg.qr(torch.randn(k, q, generator=g, dtype=torch.float64)).Q.contiguous()


def linears(*, basis=None, backend="auto", **inputs):
    """[y] by ``nsru_linear`` or, for a group, [y_i] by ``nsru_linear_group``."""
    if "weight" in inputs:
        return [nk.nsru_linear(**inputs, basis=basis, scaling=SCALINGS[0], backend=backend)]
    weights, lora_as, lora_bs, biases = map(list, zip(*_matrices(inputs), strict=True))
    return nk.nsru_linear_group(
        inputs["x"], weights, lora_as, lora_bs, basis, biases,
        scalings=SCALINGS[: len(weights)], backend=backend,
    )  # fmt: skip


def one_by_one(function, *, basis=None, **inputs):
    """The same by a function of a single linear, called for each."""
    return [
        function(inputs["x"], weight, lora_a, lora_b, bias=bias, basis=basis, scaling=scaling)
        for (weight, lora_a, lora_b, bias), scaling in zip(
            _matrices(inputs), SCALINGS, strict=False
        )
    ]


def _matrices(inputs):
    suffixes = [name.removeprefix("weight") for name in inputs if name.startswith("weight")]
    names = "weight", "lora_a", "lora_b", "bias"
    return [[inputs.get(name + suffix) for name in names] for suffix in suffixes]


def activation_projection(x, weight, lora_a, lora_b, bias=None, *, basis=None, scaling=1.0):
    """What the op replaces: x projected token by token in its own dtype, then plain LoRA."""
    projected = x if basis is None else x - (x @ basis.to(x.dtype)) @ basis.to(x.dtype).T
    update = F.linear(F.linear(projected, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * update


def run(function, inputs, wanted=None, *, dys=None, used=None):
    """(y or ys, {name: gradient}) with leaves of which only ``wanted`` require one.

    Only the outputs ``used`` go into the loss; what none of them depends on has the gradient None.
    """
    wanted = tuple(inputs) if wanted is None else wanted
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    result = function(**leaves)
    ys = [result] if isinstance(result, Tensor) else result
    if dys is None:
        g = torch.Generator().manual_seed(9)
        dys = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in ys]
    used = [i for i in range(len(ys)) if (used is None or i in used) and ys[i].requires_grad]
    grads = torch.autograd.grad(
        [ys[i] for i in used], [leaves[n] for n in wanted], [dys[i].to(ys[i]) for i in used],
        allow_unused=True,
    )  # fmt: skip
    detached = result.detach() if isinstance(result, Tensor) else [y.detach() for y in ys]
    return detached, dict(zip(wanted, grads, strict=True))


def check_against_exact(inputs, basis, *, backend="auto", **options):
    """Every y and the wanted gradients: as good as activation projection in the same dtype."""
    plain = functools.partial(one_by_one, activation_projection)
    exact_inputs = {n: t.double() for n, t in inputs.items()}
    exact_basis = None if basis is None else basis.double()
    got = run(functools.partial(linears, basis=basis, backend=backend), inputs, **options)
    eager = run(functools.partial(plain, basis=basis), inputs, **options)
    exact = run(functools.partial(plain, basis=exact_basis), exact_inputs, **options)
    for i, values in enumerate(zip(got[0], eager[0], exact[0], strict=True)):
        assert_close_to_exact(*values, f"y{i}")
    for name, value in exact[1].items():
        grad = got[1][name]
        if value is None:
            assert grad is None, f"d{name}: nothing depends on it"
            continue
        precision = inputs["x"].dtype
        assert_close_to_exact(grad, eager[1][name], value, f"d{name}", precision=precision)
        assert grad.is_contiguous() or not inputs[name].is_contiguous(), name


def tiny_llama(**changes):
    """A random Llama with grouped queries, so that q and k differ in out_features."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


opcheck = functools.partial(
    torch.library.opcheck,
    test_utils=(
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ),
)


# ---------------------------------------------------------------- by the modules of the backends


def operands(m, k, ns, ranks, dtype, *, device=DEVICE, seed=0):
    """(x, [W_i], Ā, [B_i], [b_i or None], scalings), what ``forward`` takes; the second is None."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    place = functools.partial(torch.Tensor.to, device=device, dtype=dtype)
    ws = [place(draw(n, k) / k**0.5) for n in ns]
    bs = [place(draw(n, r)) for n, r in zip(ns, ranks, strict=True)]
    biases = [place(draw(n)) if i != 1 else None for i, n in enumerate(ns)]
    a = place(draw(sum(ranks), k) / k**0.5)
    return place(draw(m, k)), ws, a, bs, biases, list(SCALINGS[: len(ns)])


def wide(value):
    """Everything in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value


def upstream(ys):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=g).to(y) for y in ys]


def adapters_and_x(count):
    """``needs`` of a training step: x and the adapters, frozen weights and biases."""
    return [True, True, *[False] * (2 * count), *[True] * count]


def check_forward(module, args, **options):
    """y_i and S against float64, no worse than eager."""
    names = [f"y{i}" for i in range(len(args[1]))]
    got, eager = module.forward(*args, **options), reference.forward(*args)
    exact = reference.forward(*wide(args))
    for name, *values in zip(
        (*names, "S"), *((*ys, s) for ys, s in (got, eager, exact)), strict=True
    ):
        assert_close_to_exact(*values, name)


def check_backward(module, args, *, needs=None, unused=(), dys=None, **options):
    """Every gradient against float64, no worse than eager; None where not needed or not used."""
    x, ws, a, bs, _, scalings = args
    count = len(ws)
    ys, s = reference.forward(*args)
    dys = upstream(ys) if dys is None else dys
    dys = [None if i in unused else dy for i, dy in enumerate(dys)]
    needs = [True] * (2 + 3 * count) if needs is None else needs
    back = dys, x, ws, a, bs, s, scalings, 0.0, None
    got, eager = module.backward(*back, needs, **options), reference.backward(*back, needs)
    exact = reference.backward(*wide(back), needs)
    names = ["dx", "da", *(f"d{name}{i}" for name in ("w", "bias", "b") for i in range(count))]
    for name, grad, *others in zip(names, got, eager, exact, strict=True):
        if others[1] is None:
            assert grad is None, f"{name} was not asked for"
            continue
        if re.fullmatch(r"da|db\d", name):  # a backend may hand them out unrounded
            assert grad.dtype in (torch.float32, x.dtype), name
            grad = grad.to(x.dtype)
        assert_close_to_exact(grad, *others, name)


def check_both_passes(module, case, dtype, **options):
    args = operands(*case, dtype, **options)
    check_forward(module, args)
    check_backward(module, args)


def check_some_gradients(module, case, dtype, unused, wanted, **options):
    """The gradients ``wanted`` by their positions, where some outputs were not used."""
    args = operands(*case, dtype, **options)
    needs = [i in wanted for i in range(2 + 3 * len(args[1]))]
    check_backward(module, args, needs=needs, unused=unused)
