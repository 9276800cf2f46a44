from typing import Any

def build_info() -> dict[str, str]: ...
def device_report() -> dict[str, Any]: ...
def kernel_image() -> int: ...

# Below: only in a build for sm_90a.
def kext_kernels() -> list[dict[str, Any]]: ...
def kext_gemm_workspace(
    *,
    x: int,
    w: int,
    p: int,
    v: int,
    bias: int,
    out: int,
    m: int,
    n: int,
    k: int,
    r: int,
    ldx: int,
    ldw: int,
    ldp: int,
    ldv: int,
    ldo: int,
    dtype: str,
    layout: str,
    config: int,
    swizzle: int,
    device: int,
    stream: int,
    workspace: int = 0,
    workspace_bytes: int = 0,
) -> int: ...
def launch_kext_gemm(
    *,
    x: int,
    w: int,
    p: int,
    v: int,
    bias: int,
    out: int,
    m: int,
    n: int,
    k: int,
    r: int,
    ldx: int,
    ldw: int,
    ldp: int,
    ldv: int,
    ldo: int,
    dtype: str,
    layout: str,
    config: int,
    swizzle: int,
    device: int,
    stream: int,
    workspace: int = 0,
    workspace_bytes: int = 0,
) -> None: ...
