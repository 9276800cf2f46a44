"""This machine: versions, processors, the extensions and the backend that serves each op."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.dispatch.explain import backend_status

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "liger-kernel",
    "cut-cross-entropy",
)
# What decides whether bf16 matrix products are fast on a CPU (x86, then Arm).
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "sve")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")
_BACKEND_ROW = "{:<8} {:<7} {}"


def describe_environment() -> dict[str, Any]:
    """Everything a bug report needs, as plain values that ``json`` can write.

    Returns:
        dict with ``version``, ``python``, ``platform``, ``packages`` (None: not installed),
        ``cpu``, ``cuda`` (the extension, torch's CUDA build, driver, GPUs or the reason for none),
        ``backends`` (one row per op and backend: op, backend, serves, reason) and ``variables``.
    """
    try:
        chosen, wrong = requested_backend("auto"), ""
    except ValueError as error:  # NSRU_BACKEND names no backend
        chosen, wrong = "auto", f": {error}"
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("NSRU_") or name in VARIABLES
    }
    if wrong:
        variables["NSRU_BACKEND"] += wrong
    return {
        "version": _version("nsru-kernels"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _describe_cpu(),
        "cuda": _describe_cuda(),
        "backends": [verdict._asdict() for verdict in backend_status(chosen)],
        "variables": variables,
    }


def format_environment(environment: dict[str, Any]) -> str:
    """The result of ``describe_environment`` as text to read or to paste into an issue."""
    cpu, cuda = environment["cpu"], environment["cuda"]
    packages = [
        f"{name} {version}" if version else f"{name} not installed"
        for name, version in environment["packages"].items()
    ]
    gpus = [
        f"{gpu['name']}: sm_{gpu['capability'][0]}{gpu['capability'][1]}, "
        f"{gpu['multiprocessors']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 {gpu['l2_bytes'] / 2**20:.0f} MiB, "
        f"{gpu['shared_bytes_per_block_optin'] / 2**10:.0f} KiB shared memory a block"
        for gpu in cuda["gpus"]
    ]
    lines = [
        f"nsru-kernels  {environment['version'] or 'not installed (run from its sources)'}",
        f"python        {environment['python']}, {environment['platform']}",
        *_aligned("packages", packages),
        f"cpu           {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads, "
        f"{cpu['capability']}; {' '.join(cpu['flags']) or 'no bf16 or matrix instructions found'}; "
        f"extension: {cpu['extension']}",
        f"cuda          torch: {cuda['torch'] or 'built without CUDA'}; "
        f"driver: {cuda['driver'] or 'none'}; extension: {_format_extension(cuda['extension'])}",
        *_aligned("gpu", gpus or [f"none: {cuda['reason']}"]),
        "",
        *_format_backends(environment["backends"]),
    ]
    if environment["variables"]:
        lines += ["", *(f"{name}={value}" for name, value in environment["variables"].items())]
    return "\n".join(lines)


def _format_backends(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each verdict, with the ops that it holds for."""
    ops: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        verdict = row["backend"], "yes" if row["serves"] else "no", row["reason"]
        ops.setdefault(verdict, []).append(row["op"])
    every = len({row["op"] for row in rows})
    lines = [_BACKEND_ROW.format("backend", "serves", "reason")]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        for (name, serves, reason), held in ops.items():
            if name == backend:
                among = "" if len(held) == every else f" ({', '.join(held)})"
                lines.append(_BACKEND_ROW.format(backend, serves, reason + among))
    return lines


def build_line() -> str:
    """One line that says which extensions are part of this installation and can run."""
    cuda, cpu = _format_extension(_describe_extension()[1]), _cpu_extension()
    return f"nsru-kernels {_version('nsru-kernels')}: CUDA extension {cuda}; CPU extension: {cpu}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_bf16_products() -> bool:
    """True where this CPU multiplies bf16 matrices by instructions instead of emulating it."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu_info().get("flags", "").split())


def _cpu_info() -> dict[str, str]:
    """The first core as Linux describes it; "flags" are the instruction sets, on Arm as well."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    return {"flags": fields.get("Features", ""), **fields}


def _describe_cpu() -> dict[str, Any]:
    fields = _cpu_info()
    present = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
        "extension": _cpu_extension(),
    }


def _cpu_extension() -> str:
    return cpu_extension.unavailable(torch.device("cpu")) or "built, and runs here"


def _describe_extension() -> tuple[ModuleType | None, dict[str, Any]]:
    try:
        module = importlib.import_module("nsru_kernels._cuda")
    except ModuleNotFoundError:
        reason = "not built: no nvcc at installation, or NSRU_SKIP_CUDA=1"
        return None, {"built": False, "reason": reason}
    except ImportError as error:
        return None, {"built": True, "reason": f"does not load: {error}"}
    return module, {"built": True, "reason": None, **module.build_info()}


def _format_extension(extension: dict[str, Any]) -> str:
    if extension["reason"]:
        return extension["reason"]
    return f"built for sm {extension['archs']} with CUDA {extension['cuda']}"


def _describe_cuda() -> dict[str, Any]:
    module, extension = _describe_extension()
    driver: str | None = None
    if module is not None:
        report = module.device_report()
        gpus, reason, driver = report["devices"], report["reason"], report["driver"]
        if gpus and not torch.cuda.is_available():
            reason = "torch sees no GPU: install a build of torch with CUDA"
            extension["reason"] = reason
        elif gpus:
            try:
                extension["kernel_image"] = module.kernel_image()
            except RuntimeError as error:
                extension["reason"] = f"holds no code for the current GPU: {error}"
    else:
        gpus = [_torch_gpu(index) for index in range(torch.cuda.device_count())]
        reason = None if gpus else "torch.cuda.device_count() is 0"
    return {
        "torch": torch.version.cuda,
        "driver": driver,
        "gpus": [{**gpu, "capability": list(gpu["capability"])} for gpu in gpus],
        "reason": reason,
        "extension": extension,
    }


def _torch_gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": (properties.major, properties.minor),
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes_per_block_optin": properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def _aligned(label: str, values: list[str]) -> list[str]:
    return [f"{label if i == 0 else '':<14}{value}" for i, value in enumerate(values)]
