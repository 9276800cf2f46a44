"""A model with linears that share x, and what its tests compare."""

import copy

import torch
from linear_cases import make_basis
from torch import nn

import nsru_kernels as nk
from nsru_kernels.nn.group import LinearGroup
from nsru_kernels.nn.projections import Projections

K, R = 16, 3
WIDTHS = {"q": 12, "k": 8, "v": 8}


def nothing(name):
    pass


class Attention(nn.Module):
    """q, k and v as a layer calls them; ``order`` and the inputs can be changed by a test."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n).to(dtype) for n in WIDTHS.values())
        self.o = nn.Linear(28, K).to(dtype)
        self.order = "qkv"
        self.between = nothing

    def forward(self, x, **others):
        ys = []
        for name in self.order:
            ys.append(getattr(self, name)(others.get(name, x)))
            self.between(name)
        return self.o(torch.cat(ys, -1)).tanh()


def make_model(seed=0, dtype=torch.float32, layers=1, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(*[Attention(dtype) for _ in range(layers)])
    shared = [make_basis(K, 5, i).float() for i in range(layers)]
    subspaces = {f"{i}.{name}": shared[i] for i in range(layers) for name in WIDTHS}
    options = {"batch": {"input": batch().to(dtype)}, **options}
    report = nk.swap_linears(model, list(WIDTHS), rank=R, alpha=6, subspaces=subspaces, **options)
    for module in adapted(model):
        nn.init.normal_(module.lora_B)
    return model, report


def adapted(model):
    return [m for m in model.modules() if isinstance(m, nk.NSRULinear)]


def alone(model):
    """A copy in which every module works by itself."""
    other = copy.deepcopy(model)
    for module in adapted(other):
        module.join(LinearGroup(Projections()))
    return other


def batch(m=5, seed=1):
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


def gradients(model, x, call=None):
    """y, dX and the gradient of every adapter."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = (call or model)(leaf)
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": leaf.grad, **found}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **tolerance)  # fmt: skip


def step(model, x):
    """An optimizer step of one member."""
    for p in (model[0].k.lora_A, model[0].k.lora_B):
        p.grad = torch.ones_like(p)
    torch.optim.SGD([model[0].k.lora_A, model[0].k.lora_B], lr=0.1).step()
