"""Every chapter: what is committed is executed and complete, and it runs anew in the
`smoke` profile.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from real_data import real_root  # noqa: F401
from test_reproduce import PATIENT
from test_setup import ADDRESS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SET_UP = f"""# On Colab: install the package if it is missing.
try:
    import promptkit
except ImportError:
    %pip install -q "promptkit[book] @ git+{ADDRESS}"
    import promptkit"""
chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.strip()
    ]


def is_executed_once_from_top_to_bottom(notebook, path):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), f"execution counts {counts}"


def has_no_error_output(notebook, path):
    errors = [
        out
        for cell in code_cells(notebook)
        for out in cell.outputs
        if out.output_type == "error"
    ]
    assert not errors, errors[0].evalue


def shows_figures(notebook, path):
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    assert any(
        {"image/png", "image/svg+xml"} & set(out.get("data", {})) for out in outputs
    )


def shows_the_method_where_it_draws_it(notebook, path):
    for cell in code_cells(notebook):
        if cell.source.startswith("towers("):
            assert any("image/png" in out.get("data", {}) for out in cell.outputs)


def has_title(notebook, path):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.match(
        r"(\([\w-]+\)=\n)?# \S", first.source
    )


def sets_up_colab_first(notebook, path):
    assert code_cells(notebook)[0].source == SET_UP


def has_parameters(notebook, path):
    tagged = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    parameters = papermill.inspect_notebook(path)
    assert parameters["profile"]["default"].strip("'\"") == "mini", (
        "the committed run is the `mini` profile"
    )


def ends_with_the_full_run(notebook, path):
    last = notebook.cells[-1]
    assert last.cell_type == "markdown" and re.search(
        r"PROFILE=full|--profile full", last.source
    )


def calls_itself_by_its_name(notebook, path):
    """In its settings, under which its claims are stored, and in its last commands."""
    source = "\n".join(cell.source for cell in notebook.cells)
    named = re.findall(
        r'Chapter\("(\w+)"|\bname="(\d+_\w+)"|papermill notebooks/(\w+)\.ipynb', source
    )
    assert {"".join(names) for names in named} <= {path.stem}
    number = path.stem.split("_")[0]
    assert set(re.findall(r"reproduce .*--chapters (\d+)", source)) <= {number}


CHECKS = [
    is_executed_once_from_top_to_bottom,
    has_no_error_output,
    shows_figures,
    shows_the_method_where_it_draws_it,
    has_title,
    sets_up_colab_first,
    calls_itself_by_its_name,
    has_parameters,
    ends_with_the_full_run,
]


@chapters
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_committed_notebook(path, check):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check(notebook, path)


FEW_EPOCHS = """# The papers' recipes, but few epochs of them.
from promptkit import registry


def few_epochs(recipe_of):
    from dataclasses import replace

    def cut(recipe):
        stages = tuple(map(cut, recipe.stages))
        return replace(recipe, epochs=min(recipe.epochs, 3), stages=stages)

    return lambda *arguments: cut(recipe_of(*arguments))


registry.for_profile = few_epochs(registry.for_profile)"""


def run(path, folder, first="", **parameters):
    """nbmake runs a copy with other parameters, after a cell `first`; what the run
    stores stays in a temporary folder.
    """
    known = papermill.inspect_notebook(path)
    parameters = {key: value for key, value in parameters.items() if key in known}
    if "output" in known:
        parameters["output"] = str(folder / "output")
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbformat.write(notebook, folder / path.name)
    (folder / "pytest.ini").write_text("[pytest]\n")  # not this project's options
    (folder / "conftest.py").write_text(PATIENT)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--nbmake-timeout=240",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, path.name], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@chapters
def test_runs_in_the_smoke_profile(path, tmp_path):
    run(path, tmp_path, profile="smoke")


@pytest.mark.parametrize(
    "path", NOTEBOOKS[1:], ids=lambda path: path.stem
)  # the first is about the mini world alone
def test_runs_in_the_full_profile(path, tmp_path, real_root, monkeypatch):  # noqa: F811
    """By the papers' recipes, a few epochs of them, on few images in a real dataset's
    format, and with the mini CLIP.
    """
    monkeypatch.setenv("PROMPTKIT_DATA", str(real_root))
    at_test = "tpt" in path.stem  # an image costs as much as some epochs elsewhere
    shots = papermill.inspect_notebook(path).get("shots", {"default": ""})["default"]
    fewer = {"shots": [1, 2]} if "," in shots else {}  # a curve of two points
    run(
        path,
        tmp_path,
        FEW_EPOCHS,
        profile="full",
        model="mini",
        datasets=["imagenet"] if at_test else ["eurosat"],
        seeds=[1] if at_test else [1, 2],
        workers=1,  # other processes would train all epochs
        **fewer,
    )
