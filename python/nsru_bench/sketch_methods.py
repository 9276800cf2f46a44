"""Ways to find the leading directions of XᵀX from batches of X: ours and what else there is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

import nsru_kernels as nk
from nsru_bench.cases import normal_numbers
from nsru_bench.internals import by_short_products, update_sketch

NEVER = 2**62  # tokens between refreshes


class Method:
    """Takes batches x [M, K], then gives a basis and the share of the energy that it claims."""

    centred = False  # subtracts the mean, although that is a direction to retain like any other
    waits = True  # the host waits for the device in each update
    route = ""

    def update(self, x_MK: Tensor) -> None:
        raise NotImplementedError

    def finish(self, rank: int) -> tuple[Tensor, float]:
        """Orthonormal directions [K, at most rank] in falling order, and Σ λ_i / trace of them."""
        raise NotImplementedError

    def kept(self) -> Iterable[Tensor]:
        """Tensors that must stay in memory between two batches."""
        raise NotImplementedError

    def sums(self, x_MK: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Sums held after a first batch x, each with the exact value; none for an SVD."""
        return []

    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept())


def exact_sums(x_MK: Tensor, omega_KL: Tensor) -> tuple[Tensor, Tensor]:
    """Y and H in fp64 without any rounding of S."""
    wide_MK = x_MK.double()
    s_ML = wide_MK @ omega_KL.double()
    return wide_MK.T @ s_ML, s_ML.T @ s_ML


class Sketch(Method):
    """RetainSketch, by the route that it takes."""

    def __init__(self, k: int, width: int, device: torch.device, **options: int) -> None:
        self.sketch = nk.RetainSketch(k, width, device=device, **options)
        self.route = self.sketch.route

    def update(self, x_MK: Tensor) -> None:
        self.sketch.update(x_MK)

    def finish(self, rank: int) -> tuple[Tensor, float]:
        subspace = self.sketch.finalize(rank)
        return subspace.basis, subspace.captured_energy

    def kept(self) -> Iterable[Tensor]:
        return [value for value in self.sketch.state_dict().values() if torch.is_tensor(value)]

    def sums(self, x_MK: Tensor) -> list[tuple[Tensor, Tensor]]:
        trace = torch.tensor(self.sketch.trace), x_MK.double().square().sum().cpu()
        if self.sketch.route == "covariance":
            wide_MK = x_MK.double()
            return [trace, (self.sketch.moment(), wide_MK.T @ wide_MK)]
        if self.sketch.refreshes:
            return []
        state = self.sketch.state_dict()
        y_KL, h_LL = exact_sums(x_MK, state["omega"])
        return [trace, (state["y.fp32"], y_KL), (state["h.fp32"], h_LL)]


class Op(Method):
    """The sketch's update on bare accumulators; it has no finish."""

    def __init__(self, k: int, width: int, device: torch.device) -> None:
        self.waits = not by_short_products(device)
        self.omega_KL = (normal_numbers(device)(k, width) * k**-0.5).to(torch.bfloat16)
        self.y_KL = torch.zeros(k, width, device=device)
        self.h_LL = torch.zeros(width, width, device=device)
        self.trace = torch.zeros((), device=device, dtype=torch.float64)

    def update(self, x_MK: Tensor) -> None:
        self.trace += update_sketch(x_MK, self.omega_KL, self.y_KL, self.h_LL, backend="eager")

    def kept(self) -> Iterable[Tensor]:
        return self.omega_KL, self.y_KL, self.h_LL, self.trace

    def sums(self, x_MK: Tensor) -> list[tuple[Tensor, Tensor]]:
        y_KL, h_LL = exact_sums(x_MK, self.omega_KL)
        trace = self.trace, x_MK.double().square().sum()
        return [trace, (self.y_KL, y_KL), (self.h_LL, h_LL)]


class Covariance(Method):
    """XᵀX added up in fp32, eigh at the end.

    Args:
        product: dtype of the product's operands; None for x's own, with fp32 sums (GPU only).
    """

    waits = False

    def __init__(
        self, k: int, device: torch.device, product: torch.dtype | None = torch.float32
    ) -> None:
        self.product = product
        self.moment_KK = torch.zeros(k, k, device=device)

    def update(self, x_MK: Tensor) -> None:
        if self.product is None:
            self.moment_KK += torch.mm(x_MK.T, x_MK, out_dtype=torch.float32)
        else:
            wide_MK = x_MK.to(self.product)
            self.moment_KK.addmm_(wide_MK.T, wide_MK)

    def finish(self, rank: int) -> tuple[Tensor, float]:
        values_K, vectors_KK = torch.linalg.eigh(self.moment_KK)
        share = values_K[-rank:].sum() / self.moment_KK.trace()
        return vectors_KK[:, -rank:].flip(1), share.item()

    def kept(self) -> Iterable[Tensor]:
        return (self.moment_KK,)

    def sums(self, x_MK: Tensor) -> list[tuple[Tensor, Tensor]]:
        wide_MK = x_MK.double()
        return [(self.moment_KK, wide_MK.T @ wide_MK)]


class LowRankSVD(Method):
    """torch.svd_lowrank, which wants the whole matrix and takes no 16-bit numbers."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.batches: list[Tensor] = []

    def update(self, x_MK: Tensor) -> None:
        self.batches.append(x_MK)

    def decompose(self) -> tuple[Tensor, Tensor, Tensor]:
        x_MK = torch.cat(self.batches) if len(self.batches) > 1 else self.batches[0]
        return torch.svd_lowrank(x_MK.float(), self.width)

    def finish(self, rank: int) -> tuple[Tensor, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, sigma_L, v_KL = self.decompose()
        energy = sum(x_MK.double().square().sum() for x_MK in self.batches)
        share = sigma_L[:rank].double().square().sum() / energy
        return v_KL[:, :rank], share.item()

    def kept(self) -> Iterable[Tensor]:
        return self.batches


class PeftPCA(Method):
    """peft's IncrementalPCA as its EVA initialisation uses it."""

    centred = True

    def __init__(self, k: int, width: int, tokens: int) -> None:
        # Its default of 2·width asks for more directions than a small batch has.
        oversampled = min(2 * width, tokens, k)
        self.pca = IncrementalPCA(width, lowrank=True, lowrank_q=oversampled, lowrank_seed=42)

    def update(self, x_MK: Tensor) -> None:
        self.pca.partial_fit(x_MK)

    def finish(self, rank: int) -> tuple[Tensor, float]:
        share = self.pca.explained_variance_ratio_[:rank].sum().item()
        return self.pca.components_[:rank].T, share

    def kept(self) -> Iterable[Tensor]:
        return [value for value in vars(self.pca).values() if torch.is_tensor(value)]


def residual_energy(x_MK: Tensor, basis_KQ: Tensor) -> float:
    """‖X - X U Uᵀ‖² / ‖X‖² in fp64, without the cancellation of 1 - captured."""
    x_MK, basis_KQ = x_MK.double(), basis_KQ.double()
    rest_MK = x_MK - (x_MK @ basis_KQ) @ basis_KQ.T
    return (rest_MK.square().sum() / x_MK.square().sum()).item()


def assert_orthonormal(name: str, basis_KQ: Tensor, tolerance: float = 1e-3) -> None:
    gram_QQ = basis_KQ.double().T @ basis_KQ.double()
    gram_QQ.diagonal().sub_(1)
    error = gram_QQ.abs().max().item() if gram_QQ.numel() else 0.0
    assert error <= tolerance, f"{name}: UᵀU is off by {error:.1e} > {tolerance:.0e}"
