import importlib.metadata
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = (
    "NSRU_SKIP_CUDA", "NSRU_SKIP_CPU", "NSRU_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH",
    "CUTLASS_DIR", "CXX",
)  # fmt: skip


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module whose call of setup() is only recorded."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    module = types.ModuleType("nsru_setup")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), module.__file__, "exec"), module.__dict__)
    module.arguments = arguments
    return module


def make_nvcc(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


def test_every_package_folder_is_built(build):
    for top, prefix in (
        (ROOT / "nsru_kernels", ROOT),
        (ROOT / "python/nsru_train", ROOT / "python"),
    ):
        folders = {path.parent.relative_to(prefix) for path in top.rglob("*.py")}
        assert {".".join(folder.parts) for folder in folders} <= set(build.arguments["packages"])


def test_nvcc_is_taken_from_the_most_explicit_place(build, monkeypatch, tmp_path):
    from_home, from_cudacxx = make_nvcc(tmp_path / "home"), make_nvcc(tmp_path / "cudacxx")
    monkeypatch.setenv("PATH", str(make_nvcc(tmp_path / "path").parent))
    assert build.find_nvcc() == str(tmp_path / "path/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(from_home)
    monkeypatch.setenv("CUDACXX", str(from_cudacxx))
    assert build.find_nvcc() == str(from_cudacxx)


def test_without_nvcc_one_line_says_that_there_is_no_cuda_backend(build, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert build.cuda_extension() == []
    assert re.fullmatch(
        r"nsru-kernels: build without the CUDA backend: nvcc was not found.*\n",
        capsys.readouterr().out,
    )


def test_skip_cuda_wins_over_nvcc(build, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    assert [extension.name for extension in build.cuda_extension()] == ["nsru_kernels._cuda"]
    monkeypatch.setenv("NSRU_SKIP_CUDA", "1")
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert build.cuda_extension() == []
    assert "NSRU_SKIP_CUDA" in capsys.readouterr().out


def test_the_cpu_extension_needs_a_compiler_on_x86_linux_and_may_fail(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.cpu_extension() == [], "no compiler"
    monkeypatch.setenv("CXX", str(compiler))
    (extension,) = build.cpu_extension()
    assert (extension.name, extension.optional) == ("nsru_kernels._cpu", True)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.cpu_extension() == []
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("NSRU_SKIP_CPU", "1")
    assert build.cpu_extension() == []


@pytest.mark.parametrize(
    ("value", "archs"),
    [("90a", "90a"), ("80;90a", "80;90a"), ("80, 90a-real 100f", "80;90a-real;100f")],
)
def test_architectures(build, monkeypatch, value, archs):
    monkeypatch.setenv("NSRU_CUDA_ARCHS", value)
    assert build.cuda_archs() == archs


@pytest.mark.parametrize("value", ["", "sm_90", "9.0", "80;hopper"])
def test_a_wrong_architecture_names_the_variable(build, monkeypatch, value):
    monkeypatch.setenv("NSRU_CUDA_ARCHS", value)
    with pytest.raises(OptionError, match="NSRU_CUDA_ARCHS"):
        build.cuda_archs()


def test_cutlass_is_asked_for_only_where_the_gemm_is_built(build, monkeypatch):
    requirement = build.cutlass_requirement
    extension = [setuptools.Extension("nsru_kernels._cuda", sources=[])]
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    assert requirement(extension) == [], "would be downloaded by setuptools"
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    assert requirement([]) == [], "an install without CUDA"
    assert requirement(extension) == [build.CUTLASS]
    monkeypatch.setenv("NSRU_CUDA_ARCHS", "80,100f")
    assert requirement(extension) == []
    monkeypatch.setenv("NSRU_CUDA_ARCHS", "90a-real")
    assert requirement(extension) == [build.CUTLASS]
    monkeypatch.setenv("CUTLASS_DIR", "/somewhere")
    assert requirement(extension) == []


def test_pip_hears_of_cutlass_by_the_build_hook(build, tmp_path):
    hook = "from setuptools.build_meta import get_requires_for_build_wheel as f; print(f())"
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment["CUDACXX"] = str(make_nvcc(tmp_path))
    answer = subprocess.check_output(
        [sys.executable, "-c", hook], cwd=ROOT, env=environment, text=True
    )
    assert answer.splitlines()[-1] == repr([build.CUTLASS])


def test_the_makefile_and_cmake_name_the_same_cutlass(build):
    for file in ("Makefile", "cmake/cutlass.cmake"):
        assert build.CUTLASS in (ROOT / file).read_text(), file


def test_a_failed_cuda_build_fails_the_install_and_names_the_remedy(build, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pybind11", types.SimpleNamespace(get_cmake_dir=lambda: "/p"))
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")

    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    command = build.CMakeBuild(setuptools.Distribution({"name": "nsru-kernels", "version": "0"}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    with pytest.raises(CompileError, match="NSRU_SKIP_CUDA=1"):
        command.build_extension(setuptools.Extension("nsru_kernels._cuda", sources=[]))


def test_the_base_install_needs_torch_safetensors_and_numpy_only():
    try:
        requirements = importlib.metadata.requires("nsru-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nsru-kernels is not installed, only its sources are on the path")
    base = {re.split(r"[<>=~!\[ ;]", text)[0] for text in requirements if "extra ==" not in text}
    assert base == {"torch", "safetensors", "numpy"}


def test_import_needs_none_of_the_training_packages():
    blocked = ["transformers", "peft", "accelerate", "datasets", "triton", "scipy", "matplotlib"]
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
        "import nsru_kernels, torch\n"
        "layer = nsru_kernels.NSRULinear(8, 4, 2, alpha=2)\n"
        "assert layer(torch.ones(3, 8)).shape == (3, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_extension_is_independent_of_torch_and_of_a_shared_cuda_runtime():
    cuda = pytest.importorskip("nsru_kernels._cuda", reason="the CUDA extension is not built")
    binary = Path(cuda.__file__).read_bytes()
    assert b"libcuda" in binary  # the static runtime opens the driver by name
    for name in (b"libtorch", b"libc10", b"libcudart.so", b"_ZN2at", b"_ZN3c10"):
        assert name not in binary


def test_cpu_extension_is_independent_of_torch_and_brings_no_threads():
    cpu = pytest.importorskip("nsru_kernels._cpu", reason="the CPU extension is not built")
    binary = Path(cpu.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"libgomp", b"_ZN2at", b"_ZN3c10"):
        assert name not in binary


@pytest.mark.parametrize("error", [ModuleNotFoundError("pybind11"), OSError("no cmake")])
def test_a_failed_cpu_build_is_left_out(build, monkeypatch, error):
    def fail(*_):
        raise error

    def run(*, optional):
        distribution = setuptools.Distribution({"name": "nsru-kernels", "version": "0"})
        distribution.ext_modules = [
            setuptools.Extension("nsru_kernels._cpu", sources=[], optional=optional)
        ]
        command = build.CMakeBuild(distribution)
        command.ensure_finalized()
        command.run()

    monkeypatch.setattr(build.CMakeBuild, "run_cmake", fail)
    run(optional=True)
    with pytest.raises(CompileError, match="no kernels for CPUs with AMX"):
        run(optional=False)
