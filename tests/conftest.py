"""Fixtures that several test files share."""

import pytest

from promptkit import testing
from promptkit.clip import FrozenCLIP


@pytest.fixture(scope="session")
def make_clip():
    """A function that makes tiny CLIPs, of a seed, a number of text layers, a
    precision, ...
    """
    return testing.tiny_clip


@pytest.fixture(scope="session")
def tiny_clip(make_clip) -> FrozenCLIP:
    """Text width 32, 3 layers; images of 32 px in patches of 8, width 32, 2 layers;
    features of 24.
    """
    return make_clip()


@pytest.fixture
def dataset(tiny_clip):
    """Five classes of images for it; a file may have its own."""
    return testing.toy_dataset(tiny_clip)
