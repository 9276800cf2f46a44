"""Answer every question that only a GPU can answer, in order of value, within a time budget.

    make gpu-check                        # on a machine with an NVIDIA GPU, no network needed
    make gpu-check GPU_CHECK_SECONDS=900  # another budget; the default is nine minutes
    make gpu-check DRY=1                  # the same walk on a CPU with tiny sizes

Builds the CUDA extension (while the Triton tests run), runs the tests marked ``gpu`` and the small
kernel tests under compute-sanitizer, then the benchmarks, writes plans, runs all small tests in the
time that is left, prints a table. Whatever is done is on disk at once, so a run that is cut off
loses only what it had not reached. The GEMM is built where CUTLASS_DIR or nvidia-cutlass is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from nsru_bench import rows, winners
from nsru_bench.internals import slug
from nsru_kernels.environment import describe_environment, format_environment

ROOT = rows.ROOT
BUDGET_S = 540.0
TESTS = "tests/kernels"
# Tests at small sizes run on the GPU where there is one, marked or not.
SMALL = tuple(
    f"{TESTS}/test_{name}.py"
    for name in ("linear_triton", "sketch_triton", "project_kernels", "linear_group_cuda")
)
# Every kernel at small sizes.
SANITIZED = tuple(
    f"{TESTS}/test_{test}"
    for test in (
        "narrow_cuda.py::test_small_on_a_gpu",
        "sketch_cuda.py::test_small_sizes_on_a_gpu",
        "linear_cuda.py::test_gemm_every_config",
        "project_kernels.py::test_odd_sizes",
        "project_kernels.py::test_short_adapters",
        "linear_triton.py::test_values_and_every_gradient",
        "sketch_triton.py::test_update_is_its_formula",
    )
)


class Check:
    """The walk: a clock, a folder, and one line per step for the summary."""

    def __init__(self, out: Path, seconds: float, dry: bool):
        self.out, self.dry = out, dry
        self.deadline = time.monotonic() + seconds
        self.lines: list[str] = []
        self.failed = False
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, step: str, result: str) -> None:
        self.lines.append(f"{step:<34}{result}")
        print(self.lines[-1], flush=True)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def start(self, name: str, command: list[str], **variables: str) -> subprocess.Popen:
        """A command in the background; its output goes to ``<name>.log``."""
        log = (self.out / f"{name}.log").open("w")
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
        environment |= variables
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )

    def finish(self, name: str, process: subprocess.Popen, seconds: float) -> bool:
        """Wait at most ``seconds``, and never beyond the budget; note how it ended."""
        started = time.monotonic()
        try:
            code = process.wait(max(1.0, min(seconds, self.left())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        tail = (self.out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        last = tail[-1][:100] if tail else ""
        state = "out of time" if code is None else "ok" if code == 0 else f"FAILED ({code})"
        self.failed |= code != 0
        self.note(name, f"{state}, {time.monotonic() - started:.0f} s: {last}")
        return code == 0

    def skip(self, name: str, reason: str) -> None:
        self.note(name, f"not run: {reason}")


def build(check: Check) -> subprocess.Popen | None:
    """The CUDA extension in place, for this GPU alone; in the background."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        check.skip("build", "no nvcc")
        return None
    if check.dry:
        check.skip("build", "DRY; `make cuda` compiles it")
        return None
    major, minor = torch.cuda.get_device_capability()
    cutlass = os.environ.get("CUTLASS_DIR") or importlib.util.find_spec("cutlass_library")
    if not cutlass:
        check.note("build", "no CUTLASS (CUTLASS_DIR, nvidia-cutlass): without the GEMM")
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) and cutlass else ''}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return check.start("build", command, NSRU_CUDA_ARCHS=arch)


def run_tests(
    check: Check, name: str, seconds: float, *arguments: str, marked: str = "gpu"
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={check.out / name}.xml"]
    if check.dry:  # the interpreter is slow, and `make test` interprets everything
        command += ["-x", "tests/kernels/test_linear_triton.py", "-k", "every_plan"]
    else:
        command += ["-m", marked, *arguments]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "6"]  # most of the time goes into compiling Triton's kernels
    check.finish(name, check.start(name, command), seconds)


def sanitize(check: Check, seconds: float) -> None:
    """Small tests of every kernel with every memory access checked."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if check.dry or not Path(sanitizer).exists():
        check.skip("sanitizer", "DRY" if check.dry else "no compute-sanitizer")
        return
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "gpu or not gpu", *SANITIZED]
    # torch's caching allocator would hide accesses beyond a tensor inside its own blocks.
    process = check.start("sanitizer", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    check.finish("sanitizer", process, seconds)


def run_benchmarks(check: Check) -> None:
    """All of bench.py in one process; what does not fit is listed by it."""
    seconds = check.left() - 15  # for plans, pictures and the table
    command = [sys.executable, "-m", "nsru_bench.bench", "--out", str(check.out)]
    command += ["--seconds", f"{seconds - 20:.0f}"]
    if check.dry:
        command += ["--tiny", "--dtype", "float32", "--rounds", "2", "--device", "cpu"]
    interpreter = {"TRITON_INTERPRET": "1"} if check.dry else {}
    check.finish("benchmarks", check.start("benchmarks", command, **interpreter), seconds)


def write_plans(check: Check) -> None:
    """The winners of the benchmarks, where ``auto`` finds them."""
    if check.dry:
        check.skip("plans", "DRY")
        return
    try:
        path = winners.write_plans(check.out)
    except (KeyError, ValueError) as error:
        check.skip("plans", f"{type(error).__name__}: {error}")
        check.failed = True
        return
    (check.out / "plans.json").write_text(path.read_text())
    check.note("plans", f"written to {path.relative_to(ROOT)}")


def table(out: Path) -> str:
    """The ratios that matter, from the rows on disk."""
    lines = []
    for op in ("linear", "siblings", "narrow", "fold", "host_time", "sketch", "loss", "step"):
        for row in rows.read(out / f"{op}.csv"):
            if not row.get("ratio"):
                continue
            names = ("pass", "product", "M", "K", "C", "N", "R", "L")
            sizes = " ".join(row[name] for name in names if row.get(name))
            who = f"{row['provider']} {row['plan']}".strip()
            lines.append(
                f"{op:<10}{sizes:<40}{who:<32}{float(row['p50_ms']):10.4f} ms"
                f"{float(row['ratio']):8.3f} × {row['base']}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no CUDA device. `make gpu-check DRY=1` walks on a CPU.")
    device = "dry" if options.dry else torch.cuda.get_device_name()
    out = (options.out or rows.RESULTS / slug(device)).resolve()
    check = Check(out, options.seconds, options.dry)

    described = describe_environment()
    (out / "environment.json").write_text(json.dumps(described, indent=1))
    print(format_environment(described))
    check.note("commit", rows.commit())

    building = build(check)
    run_tests(check, "triton-tests", 150, "-k", "triton", TESTS)
    if building is not None and check.finish("build", building, 240):
        run_tests(check, "cuda-tests", 90, "-k", "cuda or Cuda", TESTS)
    sanitize(check, 100)
    if check.left() > 40:
        run_benchmarks(check)
    else:
        check.skip("benchmarks", f"{check.left():.0f} s left")
    write_plans(check)
    if not check.dry and check.left() > 30:
        run_tests(check, "small-tests", check.left(), *SMALL, marked="not gpu")
    text = table(out)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    print("\n".join(["", *check.lines, f"results in {out}"]))
    if check.failed:
        sys.exit("gpu-check: not everything ran or passed; see the lines above and the logs.")


if __name__ == "__main__":
    main()
