"""Every example in a docstring runs as written."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import nsru_kernels
import nsru_train

NAMES = [
    module.name
    for package in (nsru_kernels, nsru_train)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if module.name != "nsru_kernels._cuda"
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [
        test
        for name in NAMES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(found) >= 10
