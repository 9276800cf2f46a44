"""RetainSubspace: an orthonormal basis with its certificate, and its file."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from nsru_kernels.files import atomic_write

_FORMAT = "nsru-retain-subspace-1"


@dataclasses.dataclass(frozen=True, eq=False)
class RetainSubspace:
    """Top eigenvectors U of the uncentred second moment XᵀX of retain activations.

    Attributes:
        basis: U [K, Q] fp32, orthonormal columns by falling eigenvalue; Q may be 0.
        eigenvalues: [Q] fp64, lower bounds of the eigenvalues of XᵀX, falling.
        trace: ‖X‖²_F over all tokens.
        tokens: rows of X.
        rank_limited: the rank or energy asked for could not be reached with the directions that the
            sketch held.

    Raises: ValueError: shapes do not fit, or entries are NaN or infinite.
    """

    basis: Tensor
    eigenvalues: Tensor
    trace: float
    tokens: int
    rank_limited: bool = False

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.basis.shape[1] > self.basis.shape[0]:
            raise ValueError(
                f"RetainSubspace: basis must be [K, Q] with Q <= K, got {tuple(self.basis.shape)}."
            )
        if self.eigenvalues.shape != self.basis.shape[1:]:
            raise ValueError(
                f"RetainSubspace: eigenvalues must be [Q={self.rank}] like basis's columns, got "
                f"{tuple(self.eigenvalues.shape)}."
            )
        for name in ("basis", "eigenvalues"):
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"RetainSubspace: {name} has NaN or infinite entries.")

    def __repr__(self) -> str:
        return (
            f"RetainSubspace(in_features={self.in_features}, rank={self.rank}, captured_energy="
            f"{self.captured_energy:.4f}, rank_limited={self.rank_limited}, tokens={self.tokens})"
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
        return min(1.0, self.eigenvalues.sum().item() / self.trace) if self.trace else 1.0

    def truncate(self, rank: int | None = None, energy: float | None = None) -> RetainSubspace:
        """The leading directions only.

        Args:
            rank: at most this many.
            energy: the fewest whose captured energy is at least this share, 0 < energy <= 1.

        Returns: a new RetainSubspace with its own memory; `rank_limited` when there were too few.
        Raises: ValueError: not exactly one argument, or one outside its range.
        """
        if rank is not None and energy is None:
            if rank < 0:
                raise ValueError(f"truncate: rank must be 0 or more, got {rank}.")
            wanted = rank
        elif energy is not None and rank is None:
            check_share("truncate", "energy", energy)
            shares = self.eigenvalues.cumsum(0) / (self.trace or 1.0)
            # With no energy at all, no direction is needed for any share of it.
            wanted = int((shares < energy).sum()) + 1 if self.trace else 0
        else:
            raise ValueError(f"truncate: give rank or energy, got {rank=}, {energy=}.")
        kept = min(wanted, self.rank)
        return dataclasses.replace(
            self,
            basis=self.basis[:, :kept].clone(memory_format=torch.contiguous_format),
            eigenvalues=self.eigenvalues[:kept].clone(),
            rank_limited=self.rank_limited or wanted > self.rank,
        )

    def to(self, device: torch.device | str) -> RetainSubspace:
        """The same subspace with its basis on `device`."""
        return dataclasses.replace(self, basis=self.basis.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: a temporary file first, renamed once it is complete."""
        from safetensors.torch import save

        metadata = {
            "format": _FORMAT,
            "trace": float(self.trace).hex(),
            "tokens": str(self.tokens),
            "rank_limited": str(self.rank_limited),
        }
        tensors = {"basis": self.basis, "eigenvalues": self.eigenvalues}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        atomic_write(path, save(tensors, metadata))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> RetainSubspace:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, of another kind, or holds NaN.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"RetainSubspace.load: {path} is not a retain subspace: format must be "
                        f"{_FORMAT!r}, got {metadata.get('format')!r}."
                    )
                return cls(
                    file.get_tensor("basis").to(device),
                    file.get_tensor("eigenvalues"),
                    trace=float.fromhex(metadata["trace"]),
                    tokens=int(metadata["tokens"]),
                    rank_limited=metadata["rank_limited"] == "True",
                )
        except SafetensorError as error:
            raise ValueError(
                f"RetainSubspace.load: {path} ({os.path.getsize(path)} bytes) is truncated or not "
                f"a safetensors file ({error}); estimate the subspaces again."
            ) from error


def check_share(function: str, name: str, value: float) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{function}: {name} must be above 0 and at most 1, got {value}.")
