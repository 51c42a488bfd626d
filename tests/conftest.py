"""Shared by all tests: fixed thread count (the rounding of CPU sums depends on it), the two tiers, small models."""

import os
import random
import zlib

import numpy as np
import pytest
import torch

import sdcore
from sdcore.pipeline import Pipeline
from tests import tiny_models

ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # else beside others, on the same cores
torch.set_num_threads(int(os.environ.get("SDCORE_TEST_THREADS", "2" if ALONE else "1")))


def pytest_addoption(parser):
    parser.addoption("--check", action="store_true", help="also run the long proofs (make check)")


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item):
    """Every test begins with random numbers of its own, the same in every run, whichever ran before it."""
    seed = zlib.crc32(item.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--check"):
        return
    skip = pytest.mark.skip(reason="a long proof: run by `make check`")
    for item in items:
        if "check" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> folder with a small random model, written on first use."""
    root, written = tmp_path_factory.mktemp("models"), {}

    def folder(family: str):
        if family not in written:
            written[family] = tiny_models.write_folder(root / family, family)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def pipes(folders):
    """Family -> our pipeline on it, loaded once."""
    loaded: dict[str, Pipeline] = {}

    def pipe(family: str) -> Pipeline:
        if family not in loaded:
            loaded[family] = sdcore.load(str(folders(family)), device="cpu")
        return loaded[family]

    return pipe
