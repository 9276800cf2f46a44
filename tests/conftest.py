"""What every test shares: one thread per xdist worker, a device for kernels, real data's folder."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with TOFU and its public logs; NSRU_TEST_DATA says where it is."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("NSRU_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(
            f"real data is not at {folder}; set NSRU_TEST_DATA to the folder that holds tofu/"
        )
    return folder
