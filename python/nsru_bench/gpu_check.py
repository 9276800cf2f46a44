"""Answer every question that only a GPU can answer, in order of value, within a time budget.

    make gpu-bundle                       # before, where nvcc is: the extension for the GPU machine
    make gpu-check                        # on a machine with an NVIDIA GPU, no network needed
    make gpu-check GPU_CHECK_SECONDS=900  # another budget; the default is nine minutes
    make gpu-check DRY=1                  # the same walk on a CPU with tiny sizes

Each phase is a process of its own with a limit of its own, that ends with all it started. After
each one everything found so far (logs, rows, plans, summary) is packed into one archive under
``--out``: a run that is cut off loses only the phase that it was in. The first five take at most
330 s; then come the tests marked ``gpu``, and the small ones under compute-sanitizer. The extension
comes from the bundle; where that does not load it is compiled, with the bundle's CUTLASS.
NSRU_COMMIT and NSRU_VERSION say what git and pip would, where there is neither.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nsru_bench import rows, winners
from nsru_bench.internals import slug
from nsru_kernels.files import atomic_write

ROOT = rows.ROOT
BUNDLE = ROOT / "build" / "gpu-bundle"
BUDGET_S = 540.0
UNTIL_TESTS_S = 330.0
WORKERS = 12
# What asks for no more than that the extension runs on this GPU.
LOAD = """
import torch
from nsru_kernels.dispatch.extension import unavailable
reason = unavailable("project", torch.device("cuda"))
print(reason or "serves")
raise SystemExit(reason is not None)
"""
TESTS = "tests/kernels"
# Tests at small sizes run on the GPU where there is one, marked or not.
SMALL = tuple(
    f"{TESTS}/test_{name}.py" for name in ("linear_triton", "project_kernels", "linear_group_cuda")
)
# Every kernel at small sizes.
SANITIZED = tuple(
    f"{TESTS}/test_{test}"
    for test in (
        "narrow_cuda.py::test_small_on_a_gpu",
        "linear_cuda.py::test_gemm_every_config",
        "project_kernels.py::test_odd_sizes",
        "project_kernels.py::test_short_adapters",
        "linear_triton.py::test_values_and_every_gradient",
    )
)


class Phase(NamedTuple):
    """A part of the walk: its benchmarks, and the seconds it may take."""

    name: str
    seconds: float
    ops: tuple[str, ...]


# In order of value. The last, whole steps, follow the plans of those before.
PHASES = (
    Phase("contact", 15, ()),
    Phase("correctness", 45, ("correctness",)),
    Phase("headline", 150, ("linear", "siblings", "fold")),
    Phase("kernels", 40, ("narrow", "sketch")),
    Phase("model", 50, ("host_time", "step")),
)
PLANS_AFTER = ("headline",)


class Check:
    """The walk: a clock, a folder of results, the archive of it, a line for each phase."""

    def __init__(self, out: Path, seconds: float, dry: bool, archive: Path | None = None):
        self.out, self.dry = out, dry
        self.archive = archive or out.with_name(f"{out.name}.tar.gz")
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.lines: list[str] = []
        self.failed = False
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, step: str, result: str) -> None:
        self.lines.append(f"{step:<34}{result}")
        print(self.lines[-1], flush=True)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def skip(self, name: str, reason: str) -> None:
        self.note(name, f"not run: {reason}")

    def run(self, name: str, command: list[str], seconds: float, **variables: str) -> bool:
        """A command of at most ``seconds``, and never beyond the budget; its output goes to
        ``<name>.log``. At the end nothing that it started is left, and all is packed."""
        log = self.out / f"{name}.log"
        paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment | variables, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(max(1.0, min(seconds, self.left())))
            except subprocess.TimeoutExpired:
                code = None
            with contextlib.suppress(ProcessLookupError):  # where no worker outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tail = log.read_text(errors="replace").strip().splitlines()
        state = "out of time" if code is None else "ok" if code == 0 else f"FAILED ({code})"
        self.failed |= code != 0
        self.note(name, f"{state}, {time.monotonic() - started:.0f} s: {(tail or [''])[-1][:100]}")
        self.pack()
        return code == 0

    def pack(self) -> None:
        """All results in one archive, which is whole at any time."""
        (self.out / "table.txt").write_text(table(self.out) + "\n")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.out, arcname=self.out.name)
        atomic_write(self.archive, packed.getvalue())


def run_phase(check: Check, phase: Phase) -> None:
    seconds = min(phase.seconds, check.started + UNTIL_TESTS_S - time.monotonic())
    if check.dry:  # Triton's interpreter is slow, and so are busy machines
        seconds = check.left()
    if seconds < 5:
        check.skip(phase.name, f"{seconds:.0f} s left before the tests")
        return
    command = [sys.executable, "-m", "nsru_bench.bench" if phase.ops else "nsru_bench.contact"]
    command += [*phase.ops, "--out", str(check.out)]
    if phase.ops:
        # What does not fit is left out; ten seconds are for imports and for leaving in order.
        command += ["--quick", "--seconds", f"{max(1.0, seconds - 10):.0f}"]
    if check.dry:
        command += ["--tiny"]
        if phase.ops:
            command += ["--dtype", "float32", "--rounds", "2", "--device", "cpu"]
    check.run(phase.name, command, seconds, **({"TRITON_INTERPRET": "1"} if check.dry else {}))


def load_extension(check: Check) -> None:
    """The extension of the bundle in its place; compiled where that one does not load."""
    if check.dry:
        check.skip("extension", "DRY; `make cuda` compiles it")
        return
    found = sorted(BUNDLE.glob("_cuda*.so"))
    for module in found:
        shutil.copy(module, ROOT / "nsru_kernels")
    load = [sys.executable, "-c", LOAD]
    if found:
        if check.run("extension", load, 30):
            return
        for module in found:
            (ROOT / "nsru_kernels" / module.name).unlink()
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        check.skip("build", "no extension in build/gpu-bundle that loads, and no nvcc")
        return
    cutlass = os.environ.get("CUTLASS_DIR")
    if packed := next(iter(BUNDLE.glob("cutlass.tar.gz")), None):
        with tarfile.open(packed) as archive:
            archive.extractall(BUNDLE, filter="data")
        cutlass = cutlass or str(BUNDLE / "cutlass")
    with_gemm = cutlass or importlib.util.find_spec("cutlass_library")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) and with_gemm else ''}"
    variables = {"NSRU_CUDA_ARCHS": arch} | ({"CUTLASS_DIR": cutlass} if cutlass else {})
    before = time.monotonic()
    check.run(
        "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240,
        NSRU_SKIP_CPU="1", **variables,
    )  # fmt: skip
    check.started += time.monotonic() - before  # on top of the phases' time


def run_tests(check: Check) -> None:
    """The tests of every kernel."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if check.dry:  # the interpreter is slow, and `make test` interprets everything
        chosen = ["tests/kernels/test_linear_triton.py", "-x", "-k", "every_plan_gives_the_same_b"]
        check.run("tests", [*pytest, *chosen], check.left())
        return
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(WORKERS)]  # most of the time goes into compiling Triton's kernels
    for name, arguments in (
        ("gpu-tests", ["-m", "gpu", TESTS]),
        ("small-tests", ["-m", "not gpu", *SMALL]),
    ):
        if check.left() > 30:
            junit = f"--junitxml={check.out / name}.xml"
            check.run(name, [*pytest, junit, *arguments], 0.6 * check.left())
        else:
            check.skip(name, f"{check.left():.0f} s left")


def sanitize(check: Check) -> None:
    """Small tests of every kernel with every memory access checked."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if check.dry or not Path(sanitizer).exists() or check.left() < 30:
        reason = "DRY" if check.dry else f"no compute-sanitizer, or {check.left():.0f} s left"
        check.skip("sanitizer", reason)
        return
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "gpu or not gpu", *SANITIZED]
    # torch's caching allocator would hide accesses beyond a tensor inside its own blocks.
    check.run("sanitizer", command, check.left() - 10, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


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
    check.pack()


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
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check", help="of the archive")
    parser.add_argument("--results", type=Path, help="folder of the results, which are packed")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no CUDA device. `make gpu-check DRY=1` walks on a CPU.")
    results = options.results
    if results is None and options.dry:
        results = options.out / "results"
    elif results is None:
        results = rows.RESULTS / slug(torch.cuda.get_device_name())
    archive = options.out.resolve() / f"{results.name}.tar.gz"
    check = Check(results.resolve(), options.seconds, options.dry, archive)
    check.note("commit", rows.commit())
    load_extension(check)
    for phase in PHASES:
        run_phase(check, phase)
        if phase.name in PLANS_AFTER:
            write_plans(check)
    run_tests(check)
    sanitize(check)
    check.pack()
    print(table(check.out))
    print("\n".join(["", *check.lines, f"results in {check.out}, packed in {check.archive}"]))
    if check.failed:
        sys.exit("gpu-check: not everything ran or passed; see the lines above and the logs.")


if __name__ == "__main__":
    main()
