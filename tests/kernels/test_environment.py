import json
import sys

import pytest

from nsru_kernels import environment
from nsru_kernels.dispatch.explain import OPS


def test_description_is_plain_json_and_covers_every_op_and_backend():
    described = environment.describe_environment()
    assert json.loads(json.dumps(described)) == described
    rows = {(row["op"], row["backend"]) for row in described["backends"]}
    backends = ("eager", "cpu", "triton", "cuda")
    assert rows == {(op, backend) for op in OPS for backend in backends}
    for op in OPS:
        assert [row["op"] for row in described["backends"] if row["serves"]].count(op) == 1


def test_text_names_versions_devices_and_the_reason_for_each_backend():
    described = environment.describe_environment()
    described["packages"] |= {"triton": None, "peft": "1.2.3"}
    described["variables"] = {"NSRU_BACKEND": "eager"}
    text = environment.format_environment(described)
    assert "triton not installed" in text
    assert "peft 1.2.3" in text
    assert described["cpu"]["model"] in text
    assert "NSRU_BACKEND=eager" in text
    for row in described["backends"]:
        assert row["reason"]
        assert row["reason"] in text


def test_text_of_a_gpu():
    described = environment.describe_environment()
    described["cuda"]["gpus"] = [
        {
            "name": "NVIDIA H200",
            "capability": [9, 0],
            "multiprocessors": 132,
            "shared_bytes_per_block_optin": 227 * 2**10,
            "l2_bytes": 50 * 2**20,
            "memory_bytes": 140 * 2**30,
        }
    ]
    line = "NVIDIA H200: sm_90, 132 SMs, 140 GiB, L2 50 MiB, 227 KiB shared memory a block"
    assert line in environment.format_environment(described)


def test_missing_extension_is_reported_not_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, "nsru_kernels._cuda", None)
    described = environment.describe_environment()
    assert described["cuda"]["extension"]["built"] is False
    assert "NSRU_SKIP_CUDA" in environment.format_environment(described)
    assert "not built" in environment.build_line()


def test_extension_reports_devices_or_the_reason_for_none():
    cuda = pytest.importorskip("nsru_kernels._cuda", reason="the CUDA extension is not built")
    report = cuda.device_report()
    assert bool(report["devices"]) != bool(report["reason"])
    assert set(cuda.build_info()) == {"version", "archs", "cuda"}
    if not report["devices"]:
        assert report["reason"].startswith("cudaGetDeviceCount: ")
        with pytest.raises(RuntimeError, match=r"cudaFuncGetAttributes: cudaError\w+ \(\d+\): "):
            cuda.kernel_image()


@pytest.mark.gpu
def test_extension_holds_code_for_this_gpu():
    cuda = pytest.importorskip("nsru_kernels._cuda", reason="the CUDA extension is not built")
    major, minor = cuda.device_report()["devices"][0]["capability"]
    assert 80 <= cuda.kernel_image() <= 10 * major + minor


@pytest.mark.parametrize(
    "flags", ["flags\t\t: fpu avx512_bf16", "flags\t\t: fpu avx2", "Features\t: fp bf16"]
)
def test_bf16_products_are_read_from_the_instruction_sets(tmp_path, monkeypatch, flags):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(environment, "Path", lambda name: cpuinfo)
    assert environment.has_bf16_products() == ("bf16" in flags)
