"""The CUDA extension ``nsru_kernels._cuda``: whether it can serve a device, and why not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# The extension's kernels use wgmma and TMA as sm_90a code has them; such code runs on 9.0 only.
CAPABILITY = (9, 0)


def unavailable(device: torch.device) -> str | None:
    """Why the extension's kernels cannot run on ``device`` and what to do; None where they can."""
    if device.type != "cuda":
        return "CUDA kernels need tensors on a CUDA device. Use backend='eager'."
    if torch.version.hip:
        return "CUDA kernels are written for NVIDIA GPUs; this PyTorch is for ROCm. Use 'eager'."
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device. Use backend='eager'."
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return (
            f"needs compute capability 9.0 (this GPU: {capability[0]}.{capability[1]}). "
            "Use 'triton'."
        )
    try:
        module = load()
    except ModuleNotFoundError:
        return (
            "the CUDA extension is not built: no nvcc at installation, or NSRU_SKIP_CUDA=1. "
            "Reinstall where nvcc is (`make cuda` in a checkout), or use 'triton'."
        )
    except ImportError as error:
        return f"the CUDA extension does not load: {error}. Reinstall it, or use 'triton'."
    if not hasattr(module, "launch_kext_gemm"):
        return (
            f"the CUDA extension was built for sm {module.build_info()['archs']} and holds no "
            "GEMM for sm_90a. Rebuild it with NSRU_CUDA_ARCHS='80;90a', or use 'triton'."
        )
    return None


def load() -> ModuleType:
    """The compiled module. Raises ImportError."""
    return importlib.import_module("nsru_kernels._cuda")
