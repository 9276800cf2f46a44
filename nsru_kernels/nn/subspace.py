"""RetainSubspace: an orthonormal basis with its certificate, as state of a model and as a file."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from nsru_kernels.checks import check_dense, check_range
from nsru_kernels.files import atomic_write, read_tensors

_FORMAT = "nsru-retain-subspace-1"
# Largest entry of |UᵀU - I| in a file beside the rounding of its dtype; a sketch's is about 1e-6.
_ORTHONORMAL = 1e-4
ENERGY_SLACK = 1e-4  # fp32 sums may put a share of energy above 1 by 1e-6


class RetainSubspace(nn.Module):
    """Top eigenvectors U of the uncentred second moment XᵀX of retain activations.

    A module, so that its basis moves and is saved with the model whose linears share it; the rest
    describes where it came from and stays as it is. A cast of the model to 16 bits leaves the basis
    in its dtype.

    Args:
        basis: U [K, Q], orthonormal columns by falling eigenvalue; Q may be 0. A buffer.
        eigenvalues: [Q] fp64, lower bounds of the eigenvalues of XᵀX, falling, but for fp32
            rounding: one token of norm 1e6 hides thousands of norm 1 (see ``unit_tokens``). None
            where only the basis is known.
        trace: ‖X‖²_F over all tokens.
        tokens: rows of X.
        rank_limited: the rank or energy asked for could not be reached with the directions that the
            sketch held.

    Raises:
        ValueError: shapes do not fit, entries are NaN or infinite, columns are longer than 1 or not
            orthogonal, eigenvalues negative or not falling, trace or tokens negative.
    """

    basis: Tensor

    def __init__(
        self,
        basis: Tensor,
        eigenvalues: Tensor | None = None,
        trace: float = 0.0,
        tokens: int = 0,
        rank_limited: bool = False,
    ) -> None:
        super().__init__()
        _check_basis(basis)
        with torch.inference_mode(False):  # autograd cannot save a tensor made in inference mode
            basis = basis.clone() if basis.is_inference() else basis.detach()
            self.register_buffer("basis", basis.contiguous().resolve_neg())
        if eigenvalues is not None and eigenvalues.shape != basis.shape[1:]:
            raise ValueError(
                f"RetainSubspace: eigenvalues must be [Q={self.rank}] like basis's columns, got "
                f"{tuple(eigenvalues.shape)}."
            )
        if eigenvalues is not None:
            if not eigenvalues.isfinite().all():
                raise ValueError("RetainSubspace: eigenvalues has NaN or infinite entries.")
            if (eigenvalues < 0).any() or (eigenvalues.diff() > 0).any():
                raise ValueError("RetainSubspace: eigenvalues must be 0 or more, and falling.")
        if not 0 <= trace < math.inf or tokens < 0:
            raise ValueError(
                f"RetainSubspace: trace and tokens must be finite and 0 or more, got {trace=}, "
                f"{tokens=}."
            )
        self.eigenvalues = eigenvalues
        self.trace, self.tokens, self.rank_limited = trace, tokens, rank_limited
        self.owned = False  # set by the linear that registers it as its child

    def extra_repr(self) -> str:
        certificate = ""
        if self.eigenvalues is not None:
            certificate = f", captured_energy={self.captured_energy:.4f}"
        return (
            f"in_features={self.in_features}, rank={self.rank}{certificate}, "
            f"rank_limited={self.rank_limited}, tokens={self.tokens}"
        )

    def share(self) -> RetainSubspace:
        """The same subspace for a model to hold: its basis may move, this one's not."""
        return RetainSubspace(
            self.basis, self.eigenvalues, self.trace, self.tokens, self.rank_limited
        )

    @property
    def in_features(self) -> int:
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def captured_energy(self) -> float:
        """Σ λ̂_i / trace: a lower bound of the share ‖X U‖²_F / ‖X‖²_F (to 1e-6); 1 when X is 0."""
        eigenvalues = self._known_eigenvalues("captured_energy")
        return min(1.0, eigenvalues.sum().item() / self.trace) if self.trace else 1.0

    def spectrum(self) -> list[float]:
        """λ̂_i / trace of every direction, falling."""
        return (self._known_eigenvalues("spectrum") / (self.trace or 1.0)).tolist()

    def truncate(self, rank: int | None = None, energy: float | None = None) -> RetainSubspace:
        """The leading directions only.

        Args:
            rank: at most this many.
            energy: the fewest whose captured energy is at least this share, 0 < energy <= 1.

        Returns: a new RetainSubspace with its own memory; `rank_limited` when there were too few.
        Raises: ValueError: not exactly one argument, or one outside its range.
        """
        eigenvalues = self._known_eigenvalues("truncate")
        if rank is not None and energy is None:
            wanted = check_range("truncate: rank", rank, "must be 0 or more", whole=True)
        elif energy is not None and rank is None:
            check_range("truncate: energy", energy, "must be above 0 and at most 1")
            shares = eigenvalues.cumsum(0) / (self.trace or 1.0)
            # With no energy at all, no direction is needed for any share of it.
            wanted = int((shares < energy).sum()) + 1 if self.trace else 0
        else:
            raise ValueError(f"truncate: give rank or energy, got {rank=}, {energy=}.")
        kept = min(wanted, self.rank)
        return RetainSubspace(
            self.basis[:, :kept].clone(memory_format=torch.contiguous_format),
            eigenvalues[:kept].clone(),
            self.trace,
            self.tokens,
            self.rank_limited or wanted > self.rank,
        )

    def _known_eigenvalues(self, what: str) -> Tensor:
        if self.eigenvalues is None:
            raise ValueError(f"{what}: the eigenvalues of this subspace are not known.")
        return self.eigenvalues

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: a temporary file first, renamed once it is complete."""
        from safetensors.torch import save

        metadata = {
            "format": _FORMAT,
            "trace": float(self.trace).hex(),
            "tokens": str(self.tokens),
            "rank_limited": str(self.rank_limited),
        }
        tensors = {"basis": self.basis, "eigenvalues": self._known_eigenvalues("save")}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        atomic_write(path, save(tensors, metadata))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> RetainSubspace:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, of another kind, or holds what no sketch finds: NaN,
                columns that are not orthonormal, more energy than there was.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"RetainSubspace.load: {path} is not a retain subspace: format must be "
                f"{_FORMAT!r}, got {metadata.get('format')!r}."
            )
        try:
            subspace = cls(
                tensors["basis"],
                tensors["eigenvalues"],
                trace=float.fromhex(metadata["trace"]),
                tokens=int(metadata["tokens"]),
                rank_limited={"True": True, "False": False}[metadata["rank_limited"]],
            )
            subspace._check_certificate()
        except (KeyError, OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"RetainSubspace.load: {path} is not what a sketch finds ({error}); estimate the "
                "subspaces again."
            ) from error
        return subspace.to(device)

    def _check_certificate(self) -> None:
        basis_KQ = self.basis.double()
        unit_QQ = torch.eye(self.rank, dtype=torch.float64, device=basis_KQ.device)
        error = (basis_KQ.T @ basis_KQ - unit_QQ).abs().max().item() if self.rank else 0.0
        if not error <= _ORTHONORMAL + 2 * torch.finfo(self.basis.dtype).eps:
            raise ValueError(f"columns of basis must be orthonormal, UᵀU is {error:.1g} off")
        energy = self._known_eigenvalues("load").double().sum().item()
        if energy > self.trace * (1 + ENERGY_SLACK) or (self.rank and not self.trace):
            raise ValueError(f"eigenvalues sum to {energy:g}, above the trace {self.trace:g}")

    def _apply(self, fn, recurse=True):
        # A basis is for projecting in float32: rounded to 16 bits, its columns are not orthonormal.
        exact = self.basis
        super()._apply(fn, recurse)
        if self.basis.element_size() < min(4, exact.element_size()):
            self.basis = exact.to(self.basis.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (loaded := state_dict.get(prefix + "basis")) is not None:
            _check_basis(loaded)
            # The memory may be that of the user's subspaces, and of other models that hold them.
            self.basis = self.basis.clone()
            if loaded.element_size() < 4:  # keep the dtype that says that it is rounded
                self.basis = self.basis.to(loaded.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_basis(basis: Tensor) -> None:
    check_dense("RetainSubspace", basis=basis)
    if basis.dim() != 2 or not basis.is_floating_point() or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"basis must be a floating [K, Q] matrix with Q ≤ K, got {tuple(basis.shape)} "
            f"{basis.dtype}."
        )
    if not basis.is_meta and not torch.isfinite(basis).all():
        raise ValueError(
            f"basis {tuple(basis.shape)} holds NaN or infinite values; estimate the subspace again."
        )
    if not basis.is_meta and basis.numel() and (most := _largest_square(basis)) > 1.02:
        raise ValueError(
            f"basis {tuple(basis.shape)} must have orthonormal columns, or such with weights up to "
            f"1, got a largest singular value of {most**0.5:.3g}; use torch.linalg.qr(basis).Q."
        )


def _largest_square(basis_KQ: Tensor) -> float:
    """The largest eigenvalue of UᵀU from below, by some steps of power iteration."""
    columns = basis_KQ.detach().float()
    generator = torch.Generator().manual_seed(0)  # of the CPU, whatever device is the default
    vector = torch.randn(
        basis_KQ.shape[1], generator=generator, dtype=torch.float32, device="cpu"
    ).to(columns.device)
    for _ in range(10):
        vector = columns.T @ (columns @ (vector / vector.norm()))
    return float(vector.norm())
