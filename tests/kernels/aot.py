"""Compile every Triton kernel with every shipped config for an architecture, without a GPU.

    python tests/kernels/aot.py 90 [OP ...]   # one JSON object a line: kernel, config, resources
    python tests/kernels/aot.py 86 --few      # of launches that are alike the heaviest alone
    python tests/kernels/aot.py tokens 90     # what each number of tokens would compile
    python tests/kernels/aot.py layouts 80    # the pointer GEMM for W along K and along N

The launchers themselves run, on meta tensors: what they would launch is recorded and compiled, so
no list of signatures can fall behind the code.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

OPS = ("linear", "project")
TOKEN_OPS = ("linear",)
# Around multiples of 16, for which sizes are otherwise specialised; 2^31 elements and more.
TOKENS = (17, 32, 1000, 1008, 8192, 8191, 2**20)
# Dynamic shared memory that one block may ask for (CUDA C++ programming guide, table of compute
# capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_LIMIT |= dict.fromkeys((86, 89, 120), 99 * 1024)
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
NARROW_LOAD = re.compile(r"\bld\.global\.b16\b")
_TYPES = {
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float64": "fp64",
    "torch.int64": "i64",
    "torch.int32": "i32",
    "torch.bool": "i1",
    "torch.uint8": "u8",
}


class Launch(NamedTuple):
    """One kernel with one set of argument types and compile options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]

    @property
    def key(self) -> str:
        # The order of the tiles is no matter for a compiler.
        fixed = {k: v for k, v in self.constants.items() if v is not None and k != "GROUP_M"}
        return json.dumps(
            [self.kernel.__name__, self.signature, fixed, self.divisible, self.options]
        )

    @property
    def likeness(self) -> str:
        """What decides most about the code: kernel, tiles, warps, bits of numbers, layout of W."""
        parts = ("BLOCK", "STEP", "ALIGNED", "W_IS_NK", "stride_w")
        fixed = {k: v for k, v in self.constants.items() if k.startswith(parts)}
        bits = sorted({kind[-2:] for kind in self.signature.values() if kind[:2] in ("*f", "*b")})
        return json.dumps([self.kernel.__name__, fixed, bits, self.options.get("num_warps")])

    @property
    def weight(self) -> tuple[int, int, int]:
        """Grows with what is held at run time, and so with the registers: for sm_80 the heaviest of
        those alike needs most of them in three of four cases."""
        flags = sum(value is True for value in self.constants.values())
        given = sum(kind != "constexpr" for kind in self.signature.values())
        return given + flags, self.options.get("num_stages", 0), -len(self.divisible)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """In the block kernels are recorded instead of launched, as if on an ``arch`` device."""
    from triton.runtime import JITFunction

    from nsru_kernels.dispatch import launch

    launches: list[Launch] = []
    originals = JITFunction.run, launch.tuned, launch.architecture, launch.multiprocessors

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(describe(kernel, args, kwargs))

    def every_config(configs, key, tensor, run):
        results = [run(config) for config in configs]
        return results[0]

    JITFunction.run = run
    launch.tuned = every_config
    launch.architecture = lambda device: launch.ROWS[divmod(arch, 10)]
    launch.multiprocessors = lambda device: 132
    try:
        yield launches
    finally:
        JITFunction.run, launch.tuned, launch.architecture, launch.multiprocessors = originals


def describe(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """The types that the just-in-time compiler would see; sizes are specialised as it does."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, bound.arguments[parameter.name]
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif hasattr(value, "block_shape"):
            blocks = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[str(value.base.dtype)]}[{blocks}]>"
        elif hasattr(value, "dtype"):
            signature[name] = "*" + _TYPES[str(value.dtype)]
            divisible.append(name)
        elif isinstance(value, tuple):
            assert not fixed
            assert all(-(2**31) <= word < 2**31 for word in value)
            signature[name] = ("i32",) * len(value)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if fixed and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, tuple(divisible), options)


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Resources of the compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.signature)
    source = ASTSource(
        launch.kernel,
        launch.signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    blocks = {k: v for k, v in launch.constants.items() if v is not None and not callable(v)}
    return {
        "kernel": launch.kernel.__name__,
        "dtypes": sorted({t.strip("*") for t in launch.signature.values() if t[0] == "*"}),
        "constants": {k: str(v) for k, v in blocks.items()},
        **launch.options,
        "shared": compiled.metadata.shared,
        "narrow_loads": len(NARROW_LOAD.findall(compiled.asm["ptx"])),
        "tensor_core": bool(TENSOR_CORE.search(compiled.asm["ptx"])),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def kernels_for_tokens(op: str, arch: int, tokens: int) -> list[str]:
    """What a step on ``tokens`` tokens would compile; the op's module says what a step is."""
    module = importlib.import_module(f"aot_{op}")
    with recording(arch) as launches:
        module.for_tokens(tokens)
    return sorted({launch.key for launch in launches})


def compile_all(
    arch: int, ops: tuple[str, ...] = OPS, few: bool = False
) -> Iterator[dict[str, Any]]:
    """Every distinct launch of ``ops``, or the heaviest of those alike, compiled for ``arch``."""
    for op in ops:
        calls: list[Callable[[], Any]] = importlib.import_module(f"aot_{op}").CALLS
        with recording(arch) as launches:
            for call in calls:
                call()
        assert launches, f"aot_{op}: nothing was launched"
        if few:
            launches.sort(key=lambda launch: launch.weight)  # of equal keys the last stays
        distinct = {launch.likeness if few else launch.key: launch for launch in launches}
        for launch in distinct.values():
            yield {"op": op, "arch": arch, **compile_launch(launch, arch)}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    if sys.argv[1] == "tokens":
        for arch, op, tokens in itertools.product(map(int, sys.argv[2:]), TOKEN_OPS, TOKENS):
            kernels = kernels_for_tokens(op, arch, tokens)
            print(json.dumps({"arch": arch, "op": op, "tokens": tokens, "kernels": kernels}))
        return
    if sys.argv[1] == "layouts":
        arch = int(sys.argv[2])
        with recording(arch) as launches:
            importlib.import_module("aot_linear").both_layouts()
        gemms = {launch.likeness: launch for launch in launches if launch.kernel.__name__[0] == "k"}
        for launch in gemms.values():
            print(json.dumps(compile_launch(launch, arch)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    for row in compile_all(options.arch, tuple(options.ops) or OPS, options.few):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
