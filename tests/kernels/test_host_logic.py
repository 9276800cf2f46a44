"""The C++ tests of csrc/host, built with a C++ compiler alone: no nvcc, no GPU."""

import without_nvcc


def test_host_logic(tmp_path_factory):
    folder = without_nvcc.build(tmp_path_factory)
    ctest = without_nvcc.tool("ctest")
    without_nvcc.run(ctest, "--test-dir", folder, "--output-on-failure", "--no-tests=error")
