"""The examples in the docstrings of the kernel package run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["dispatch", "nn.linear", "ops.fold", "ops.linear"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"nsru_kernels.{name}"))
    assert result.attempted
    assert not result.failed
