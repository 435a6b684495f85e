"""Fixtures the tests share."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' models are tiny: a second thread only waits


def pytest_addoption(parser):
    parser.addoption("--exact", action="store_true", help="ask test_exactness.py's full set of questions")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models beside the repository; tests that need it are skipped without."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return folder


@pytest.fixture(scope="session")
def generated_root(tmp_path_factory) -> Path:
    """A folder in which the generated data of seed 0 have been built."""
    from experiments.data.sources import generated

    parent = tmp_path_factory.mktemp("generated")
    generated(parent, seed=0)
    return parent
