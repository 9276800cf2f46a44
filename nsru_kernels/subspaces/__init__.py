"""Retain subspaces: streaming estimation, certificate, files."""

from nsru_kernels.subspaces.collection import InputDiagnostics, SubspaceSet
from nsru_kernels.subspaces.estimate import estimate_retain_subspaces
from nsru_kernels.subspaces.sketch import RetainSketch
from nsru_kernels.subspaces.subspace import RetainSubspace

__all__ = [
    "InputDiagnostics",
    "RetainSketch",
    "RetainSubspace",
    "SubspaceSet",
    "estimate_retain_subspaces",
]
