"""What streams come to: residual energy against the optimum, and claims against the truth.

One row for each spectrum, width and method in ``sketch_accuracy.csv``. ``claim_error`` is the share
of energy that a method says it captured less what it did capture; a sketch's is never above 1e-6,
which is asserted. ``ratio`` is empty where the optimum is below what fp32 activations resolve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nsru_bench import rows
from nsru_bench.session import Session
from nsru_bench.sketch_methods import (
    NEVER,
    Covariance,
    LowRankSVD,
    Method,
    PeftPCA,
    Sketch,
    assert_orthonormal,
    residual_energy,
)

HARMONIC, MEAN = "1/i", "1/i and a mean"
CERTIFICATE_SLACK = 1e-6
# An incremental SVD of batches is a hundred times slower than a sketch: every other width will do.
PCA_WIDTHS = slice(1, None, 2)
RESOLVED = 1e-9


def published_spectra(k: int, rank: int = 10) -> Iterator[tuple[str, Tensor]]:
    """Singular values of the streamed X, after Tropp, Yurtsever, Udell, Cevher 2019, section 7."""
    head, tail = torch.ones(rank, dtype=torch.float64), torch.arange(1, k - rank + 1).double()
    for noise in (1e-4, 1e-2, 1e-1):
        flat = torch.full_like(tail, (noise * rank / k) ** 0.5)
        yield f"low rank + noise {noise:g}", torch.cat([head, flat])
    for power in (0.5, 1, 2):
        yield f"polynomial {power:g}", torch.cat([head, (tail + 1) ** -power])
    for rate in (0.01, 0.1, 0.5):
        yield f"exponential {rate:g}", torch.cat([head, 10 ** (-rate * tail)])


def make_stream(sigma_K: Tensor, tokens: int, *, mean: bool = False) -> Tensor:
    """Gaussian rows with these singular values up to sampling, in a random basis, fp64."""
    generator = torch.Generator().manual_seed(0)
    k = len(sigma_K)
    turn_KK = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator)).Q
    x_MK = torch.randn(tokens, k, dtype=torch.float64, generator=generator)
    if mean:  # a direction of its own with half of the energy
        x_MK = x_MK * sigma_K
        x_MK[:, -1] = sigma_K.square().sum().sqrt()
        return x_MK @ turn_KK
    return (x_MK * sigma_K) @ turn_KK


def run(session: Session) -> None:
    k, effective, rank = (60, 4, 6) if session.tiny else (1000, 10, 32)
    tokens, batch = (256, 64) if session.tiny else (8192, 512)
    widths = (8, 15) if session.tiny else (40, 64, 96, 160, 240)
    harmonic_K = torch.arange(1, k + 1, dtype=torch.float64).rsqrt()
    streams = [(HARMONIC, harmonic_K, torch.float32), (MEAN, harmonic_K, torch.float32)]
    if session.dtype != torch.float32:
        streams.append((HARMONIC, harmonic_K, session.dtype))
    streams += [(name, s_K, torch.float32) for name, s_K in published_spectra(k, effective)]
    for spectrum, sigma_K, dtype in streams:
        if session.fits(f"sketch accuracy {spectrum} {dtype}", 1 if session.tiny else 20):
            x_MK = make_stream(sigma_K, tokens, mean=spectrum == MEAN)
            run_stream(session, spectrum, x_MK.to(session.device, dtype), batch, widths, rank)


def make_cases(
    k: int, widths: tuple[int, ...], batch: int, device: torch.device
) -> Iterator[tuple[str, int, Callable[[], Method]]]:
    """(name, width, method); the covariance has no width, its row says K."""
    yield "covariance + eigh", k, lambda: Covariance(k, device)
    for width in widths:
        yield "RetainSketch", width, partial(Sketch, k, width, device)
        fixed = partial(Sketch, k, width, device, refresh_every=NEVER)
        yield "RetainSketch, no refresh", width, fixed
        yield "svd_lowrank", width, partial(LowRankSVD, width)
    for width in widths[PCA_WIDTHS]:
        yield "peft IncrementalPCA", width, partial(PeftPCA, k, width, batch)


def run_stream(
    session: Session, spectrum: str, x_MK: Tensor, batch: int, widths: tuple[int, ...], rank: int
) -> None:
    tokens, k = x_MK.shape
    wide_MK = x_MK.double()
    values_K = torch.linalg.eigvalsh(wide_MK.T @ wide_MK).clamp_(min=0)
    optimum = (values_K[:-rank].sum() / values_K.sum()).item()
    made = []
    for name, width, make in make_cases(k, widths, batch, x_MK.device):
        method = make()
        for part_MK in x_MK.split(batch):
            method.update(part_MK)
        basis_KQ, claimed = method.finish(rank)
        assert_orthonormal(name, basis_KQ)
        residual = residual_energy(x_MK, basis_KQ)
        claim_error = claimed - (1 - residual)
        if method.certified:
            assert claim_error <= CERTIFICATE_SLACK, (
                f"{name} certifies {claim_error:.1e} more than it captured of {spectrum}"
            )
        row = {"spectrum": spectrum, "provider": name, "plan": method.route}
        row |= {"K": k, "L": width, "Q": rank, "tokens": tokens, "batch": batch}
        row |= {
            "dtype": rows.dtype_name(x_MK.dtype),
            "directions": basis_KQ.shape[1],
            "residual": f"{residual:.6e}",
            "optimum": f"{optimum:.6e}",
            "ratio": round(residual / optimum, 5) if optimum > RESOLVED else "",
            "claimed": f"{claimed:.9f}",
            "claim_error": f"{claim_error:.3e}",
            "certified": method.certified,
            "centred": method.centred,
            "state_bytes": method.state_bytes(),
            "tiny": session.tiny,
        }
        made.append(row | session.columns)
        print(
            f"accuracy {spectrum:<24}{row['dtype']:<10}{name:<26}L={width:<6}residual "
            f"{residual:.3e} = {row['ratio'] or '-':<8} × optimum  claim {claim_error:+.1e}",
            flush=True,
        )
    rows.append(session.out / "sketch_accuracy.csv", made)
