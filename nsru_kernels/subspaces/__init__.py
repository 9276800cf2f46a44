"""Retain subspaces: streaming estimation, certificate, files."""

from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.subspaces.collection import InputDiagnostics, SubspaceSet
from nsru_kernels.subspaces.estimate import estimate_retain_subspaces
from nsru_kernels.subspaces.sketch import RetainSketch

__all__ = [
    "InputDiagnostics",
    "RetainSketch",
    "RetainSubspace",
    "SubspaceSet",
    "estimate_retain_subspaces",
]
