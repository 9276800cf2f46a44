"""Builds what of csrc/ needs no nvcc: the C++ tests and the emulated module. Once per test run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
# Where pip puts cmake and ninja, ahead of a system's older ones.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name, path=SEARCH))), None)
    return found or pytest.skip(f"no {' or '.join(names)} on this machine")


def run(*command: object) -> None:
    environment = {**os.environ, "PATH": SEARCH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder. Workers of one run share it."""
    compiler = tool(os.environ.get("CXX") or "c++", "g++", "clang++")
    options = [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DNSRU_WITHOUT_NVCC=ON",
    ]
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "without-nvcc"
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").exists():
            run(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
            run(tool("cmake"), "--build", folder)
            (folder / "built").touch()
    return folder


def load_emulated(folder: Path) -> ModuleType:
    """The module with our CUDA kernels compiled for this CPU."""
    found = next(folder.glob("_emulated*.so"), None)
    if found is None:
        pytest.skip("the emulated kernels need pybind11 and Python's headers")
    spec = importlib.util.spec_from_file_location("_emulated", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
