"""The page for people who add a method is run as it stands, and its method kept to what
all methods promise.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promptkit import results
from promptkit.method import REGISTRY
from promptkit.testing import PROMISES

PAGE = Path(__file__).parents[1] / "book" / "add_a_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs_as_it_stands(tmp_path):
    """As a script, whose class no other process can import, with two workers."""
    script = tmp_path / "mine.py"
    body = "\n".join(BLOCKS[1:]).replace("\n", "\n    ")
    main = f'\n\nif __name__ == "__main__":\n    {body}\n'
    script.write_text(BLOCKS[0] + main)
    environment = os.environ | {
        "PROMPTKIT_RESULTS": str(tmp_path / "results"),
        "PROMPTKIT_CACHE": os.environ.get("PROMPTKIT_CACHE", str(tmp_path / "cache")),
    }
    run = [sys.executable, script]
    said = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr[-3000:]
    assert "base " in said.stdout and "nudge" in said.stdout
    assert (tmp_path / "nudge.onnx").exists()
    rows = results.load_results(tmp_path / "results", method="nudge")
    assert len(rows) == 2 * 2 * 3 and rows["value"].between(0, 100).all()
    first = rows.set_index("hash")["value"].to_dict()
    # Stored runs are found again; another source is another run.
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    again = results.load_results(tmp_path / "results", method="nudge")
    assert again.set_index("hash")["value"].to_dict() == first
    script.write_text(script.read_text().replace("torch.zeros", "0.1 + torch.zeros"))
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    edited = results.load_results(tmp_path / "results", method="nudge")
    assert not set(edited["hash"]) & set(first)


def test_the_method_is_short():
    assert len(BLOCKS[0].strip().splitlines()) <= 40


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_its_method_keeps_the_promises(promise, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    exec(compile(BLOCKS[0], str(PAGE), "exec"), {"__name__": "nudge_page"})
    try:
        promise("nudge", tiny_clip, tmp_path)
    finally:
        REGISTRY.pop("nudge")


def test_an_entry_point_makes_a_method_known(tmp_path):
    """A package of one's own, as pip would install it."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "nudge.py").write_text(BLOCKS[0])
    about = tmp_path / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n"
    )
    points = "[promptkit.methods]\nnudge = my_package.nudge\nbroken = my_package.none\n"
    (about / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-m", "promptkit", "list", "--json"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        cwd=PAGE.parents[1],
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert '"name": "nudge"' in said.stdout and '"name": "coop"' in said.stdout
    assert "'broken' (my_package.none) could not be loaded" in said.stderr
