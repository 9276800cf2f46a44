"""Fixtures that the tests of several kernels share."""

import pytest
import torch
import without_nvcc
from gemm_stand_in import launch_kext_gemm

from nsru_kernels.dispatch import choose, extension


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN and shows in the result."""
    allocate = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        fresh = allocate(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    return without_nvcc.load_emulated(without_nvcc.build(tmp_path_factory))


@pytest.fixture
def emulated(emulated_module, monkeypatch, poisoned_memory):
    """The CUDA extension with its own kernels emulated on the CPU, thread by thread."""
    monkeypatch.setattr(extension, "load", lambda: emulated_module)
    monkeypatch.setattr(extension, "place", lambda tensor: {"device": 0, "stream": 0})
    return emulated_module


@pytest.fixture
def serves_the_cpu(emulated, monkeypatch):
    """As if the emulated extension were a GPU's."""
    monkeypatch.setattr(extension, "unavailable", lambda device: None)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def stand_in(emulated, monkeypatch):
    """The same with a stand-in for CUTLASS's GEMM, which cannot be emulated."""
    monkeypatch.setattr(emulated, "launch_kext_gemm", launch_kext_gemm, raising=False)
