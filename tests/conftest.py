"""Shared by all tests: fixed thread count (the rounding of CPU sums depends on it) and the two tiers."""

import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get("SDCORE_TEST_THREADS", "2")))


def pytest_addoption(parser):
    parser.addoption("--check", action="store_true", help="also run the long proofs (make check)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--check"):
        return
    skip = pytest.mark.skip(reason="a long proof: run by `make check`")
    for item in items:
        if "check" in item.keywords:
            item.add_marker(skip)
