"""The CUDA extension ``nsru_kernels._cuda``: whether it can serve a device, and calls into it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# 16-bit elements in 16 bytes, the unit of TMA and of wide loads for addresses and row distances.
ALIGNED = 8
_INTERFACE = 3  # of csrc/bindings.cpp
# The GEMM uses wgmma and TMA as sm_90a code has them; such code runs on 9.0 only.
_CAPABILITY = (9, 0)
_OLD = "Update the driver, rebuild with an older nvcc, or use 'triton'."
_REBUILD = "Rebuild it (`make cuda` in a checkout), or use 'triton'."


def unavailable(device: torch.device) -> str | None:
    """Reason and remedy where its kernels cannot run on ``device``; None where they can."""
    if device.type != "cuda":
        return "CUDA kernels need tensors on a CUDA device. Use backend='eager'."
    if torch.version.hip:
        return "CUDA kernels are written for NVIDIA GPUs; this PyTorch is for ROCm. Use 'eager'."
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device. Use backend='eager'."
    capability = torch.cuda.get_device_capability(device)
    this_gpu = f"(this GPU: {capability[0]}.{capability[1]})"
    if capability != _CAPABILITY:
        return f"needs compute capability 9.0 {this_gpu}. Use 'triton'."
    try:
        module = load()
    except ModuleNotFoundError:
        return (
            "the CUDA extension is not built: no nvcc at installation, or NSRU_SKIP_CUDA=1. "
            "Reinstall where nvcc is (`make cuda` in a checkout), or use 'triton'."
        )
    except ImportError as error:
        return f"the CUDA extension does not load: {error}. Reinstall it, or use 'triton'."
    archs = module.build_info()["archs"]
    if getattr(module, "interface", None) != _INTERFACE:
        return f"the CUDA extension was built from other sources. {_REBUILD}"
    if not hasattr(module, "launch_kext_gemm"):
        return (
            f"the CUDA extension was built for sm {archs} and holds no GEMM for sm_90a. "
            "Rebuild it with NSRU_CUDA_ARCHS='90a', or use 'triton'."
        )
    try:
        with torch.cuda.device(device):
            module.kernel_image()
    except RuntimeError as error:
        if "InsufficientDriver" in str(error):
            cuda = module.build_info()["cuda"]
            return (
                f"the NVIDIA driver is too old for CUDA {cuda}, which built the extension. {_OLD}"
            )
        return f"the CUDA extension was built for sm {archs}: {error} {this_gpu}. {_REBUILD}"
    return None


def load() -> ModuleType:
    """The compiled module. Raises ImportError."""
    return importlib.import_module("nsru_kernels._cuda")


def place(tensor: Tensor) -> dict[str, int]:
    """The GPU of ``tensor`` and PyTorch's current stream there, as launchers take them."""
    stream = torch.cuda.current_stream(tensor.device)
    return {"device": tensor.device.index, "stream": stream.cuda_stream}


def launch(name: str, near: Tensor, **call: Any) -> None:
    """Enqueue ``launch_<name>`` of the extension on the GPU of ``near``.

    The launcher asks for its workspace, which comes from PyTorch's allocator: freed here, it is
    used again on the same stream only after the kernels.

    Raises:
        ValueError: naming the argument that the kernel cannot take, and its value.
        RuntimeError: naming the CUDA call that failed, its code and meaning.
    """
    workspaces: list[Tensor] = []

    def allocate(size: int) -> int:
        workspaces.append(near.new_empty(size, dtype=torch.uint8))
        return workspaces[-1].data_ptr()

    getattr(load(), f"launch_{name}")(**call, **place(near), allocate=allocate)


def aligned(matrix: Tensor) -> bool:
    """True where every row of a 16-bit matrix starts at a multiple of 16 bytes."""
    return matrix.stride(0) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


def has_wide_rows(matrix: Tensor) -> bool:
    """True where kernels can read a 16-bit matrix row by row in words of 16 bytes."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] and aligned(matrix)


def row_major(matrix: Tensor) -> Tensor:
    """``matrix`` where it has wide rows; else a copy, as of a transposed or expanded one."""
    if has_wide_rows(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
