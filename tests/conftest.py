"""Quiet TensorFlow, no GPU unless asked for, and every test from the same seeds."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest
from hypothesis import settings

settings.register_profile("trainrt", deadline=None)  # what a test asserts does not depend on how busy the machine is
settings.load_profile("trainrt")


@pytest.fixture
def digits():
    """64 of the real digits, to train on in a moment: x [64, 8, 8, 1], y [64]."""
    from trainrt import digits

    (x, y), _ = digits.load()
    return x[:64], y[:64]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    skip = {
        "slow": pytest.mark.skip(reason="takes minutes: pytest -m slow"),
        "conformance": pytest.mark.skip(reason="takes minutes: pytest -m conformance"),
    }
    for item in items:
        for name, mark in skip.items():
            if name in item.keywords:
                item.add_marker(mark)
