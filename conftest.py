"""``pytest tests/parity --fixtures DIR``: the folder of parity fixtures to run on.

pytest has a ``--fixtures`` of its own, a switch that lists its fixtures, and reads it
before any conftest. Followed by a folder it means ours here; alone, or before a test
file, it is still pytest's.
"""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    given = [str(argument) for argument in config.invocation_params.args]
    folder = given[given.index("--fixtures") + 1 :][:1] if "--fixtures" in given else []
    if folder and not folder[0].startswith("-") and ".py" not in folder[0]:
        config.option.showfixtures = False
        config.option.parity_fixtures = str(config.invocation_params.dir / folder[0])
        config.args.remove(folder[0])  # pytest took it for a place of tests
        if not config.args:
            config.args += config.getini("testpaths")


def pytest_generate_tests(metafunc):
    """One parity test a fixture, with the fixture's name as its id."""
    if "parity_path" in metafunc.fixturenames:
        default = Path(__file__).parent / "tests" / "parity" / "fixtures"
        folder = Path(getattr(metafunc.config.option, "parity_fixtures", default))
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise pytest.UsageError(
                f"there are no parity fixtures (*.json) in {folder}"
            )
        metafunc.parametrize("parity_path", paths, ids=[path.stem for path in paths])
