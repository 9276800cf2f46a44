"""The C++ tests of csrc/host, built with a C++ compiler alone: no nvcc, no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where pip puts cmake and ninja, ahead of a system's older ones.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def tool(*names):
    found = next((path for name in names if (path := shutil.which(name, path=SEARCH))), None)
    return found or pytest.skip(f"no {' or '.join(names)} on this machine")


def test_host_logic(tmp_path):
    cmake, ctest = tool("cmake"), tool("ctest")
    compiler = tool(os.environ.get("CXX") or "c++", "g++", "clang++")
    environment = {**os.environ, "PATH": SEARCH}
    configure = [
        cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DNSRU_HOST_TESTS_ONLY=ON",
    ]  # fmt: skip
    for command in (
        configure,
        [cmake, "--build", tmp_path],
        [ctest, "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
