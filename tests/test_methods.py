"""What every registered method promises; a new method is tested here without a
change.
"""

import pytest

from promptkit.method import Method
from promptkit.recipe import PROTOCOLS, Setting
from promptkit.registry import methods, recipe, specs
from promptkit.testing import PROMISES

SPECS = specs()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_promise(spec, promise, tiny_clip, tmp_path):
    promise(spec, tiny_clip, tmp_path)


@pytest.mark.parametrize("spec", SPECS)
def test_describes_itself(spec):
    cls = methods()[spec.partition("(")[0]]
    assert cls.__module__ == f"promptkit.methods.{cls.name}"
    assert cls.title and cls.kind and cls.__doc__
    assert 2020 < cls.year < 2030 and cls.paper
    for protocol in PROTOCOLS:
        ours = recipe(spec, Setting(protocol, profile="full"))
        host = {"host": Method.__new__(Method)} if cls.plugin else {}
        cls.check(ours.hparams | host)
