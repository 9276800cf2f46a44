"""What stands in for CUTLASS's GEMM where there is no GPU: it checks what Python hands over."""

import ctypes

import torch


def at(address, rows, columns, ld, dtype):
    """The matrix at an address, not one byte beyond its last element."""
    size = ((rows - 1) * ld + columns) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (ld, 1))


def launch_kext_gemm(*, config, swizzle, device, stream, allocate, **c):
    """The GEMM on addresses in host memory."""
    m, n, k, r = (c[name] for name in "mnkr")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[c["dtype"]]
    for name in "xwpv":
        assert c[name] % 16 == 0, f"{name} is not aligned"
        assert c[f"ld{name}"] % 8 == 0, f"rows of {name} are not aligned"
    shapes = ((n, k), (n, r)) if c["layout"] == "NK" else ((k, n), (r, n))
    x, p = at(c["x"], m, k, c["ldx"], dtype), at(c["p"], m, r, c["ldp"], dtype)
    w, v = at(c["w"], *shapes[0], c["ldw"], dtype), at(c["v"], *shapes[1], c["ldv"], dtype)
    if c["layout"] == "NK":
        w, v = w.T, v.T
    out = x.float() @ w.float() + p.float() @ v.float()
    if c["bias"]:
        out += at(c["bias"], 1, n, n, dtype).float()
    at(c["out"], m, n, c["ldo"], dtype).copy_(out)
