"""A chapter as on Colab: opened in an empty folder, in an environment that has the
libraries but not the package, which its first cell installs from the project's address.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from test_setup import ADDRESS, ROOT

# One that trains, and the one that reads the most of what the package carries.
CHAPTERS = ["03_coop", "01_mini_world"]


def git(folder, *words):
    names = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    command = ["git", *names, *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def committed(folder):
    """A repository of what an installation takes from this one, as it would be if it
    were committed now.
    """
    try:
        listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in listed.splitlines():
        needed = "/" not in name or name.startswith(("promptkit/", "book/_static/"))
        if needed and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def environment(folder):
    """A virtual environment with the libraries of this one, without promptkit: its
    interpreter, and the folder that pip fills.
    """
    libraries = folder / "libraries"
    libraries.mkdir(parents=True)
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages"):
            continue
        for path in place.iterdir():
            # A .pth file might lead to the checkout.
            mine = "promptkit" in path.name or path.suffix == ".pth"
            if not mine and not (libraries / path.name).exists():
                (libraries / path.name).symlink_to(path)
    venv.create(folder / "venv", symlinks=True)
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "venv" / "bin" / "python", own


def settings(home, repository):
    """Environment variables with which pip takes the project's address for a local
    repository, and asks no network for more.
    """
    home.mkdir()
    (home / ".gitconfig").write_text(
        f'[url "{repository.as_uri()}"]\n  insteadOf = {ADDRESS}\n'
        '[protocol]\n  allow = never\n[protocol "file"]\n  allow = always\n'
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "JUPYTER", "PIP_", "PROMPTKIT", "PYTHON"))
    }
    # pip takes the value of the last one for that of "build isolation": 0 is none, so
    # that it builds with the setuptools that are there.
    return kept | {
        "HOME": str(home),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }


# Copied to a folder of its own together with the manager, which is not installed yet.
EXECUTE = """
import sys
import papermill
from kernel import Manager
papermill.execute_notebook(
    sys.argv[1],
    "done.ipynb",
    {"profile": "smoke"},
    kernel_name="python3",
    kernel_manager_class=Manager,
)
"""


@pytest.mark.timeout(1200)
def test_chapters_install_the_package_and_run_anywhere(tmp_path):
    repository = committed(tmp_path / "repository")
    python, installed = environment(tmp_path)
    variables = settings(tmp_path / "home", repository)
    here = tmp_path / "empty"
    here.mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(ROOT / "promptkit" / "kernel.py", tools)
    (tools / "execute.py").write_text(EXECUTE)

    def run(*command):
        done = subprocess.run(
            [python, *command], cwd=here, env=variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    assert run("-c", "import promptkit")[0], "the environment has the package already"
    for name in CHAPTERS:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        notebook.cells.append(nbformat.v4.new_code_cell("print(promptkit.__file__)"))
        nbformat.write(notebook, here / f"{name}.ipynb")
        code, said = run(tools / "execute.py", f"{name}.ipynb")
        assert code == 0, said[-6000:]
        (shown,) = nbformat.read(here / "done.ipynb", 4).cells[-1].outputs
        assert shown.text.strip() == str(installed / "promptkit" / "__init__.py")
        (here / f"{name}.ipynb").unlink()
    left = {path.name for path in here.iterdir()}
    assert left <= {"done.ipynb", "results"}, "a chapter leaves more than its runs"
