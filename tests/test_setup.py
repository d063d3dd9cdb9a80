"""The files that set the project up agree with one another."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where the repository is: the one place that says it. What is read where pyproject.toml
# is not, such as a chapter's first cell on Colab, repeats it and is compared with it.
ADDRESS = PROJECT["urls"]["Repository"]
FIXED = (
    "torch open_clip_torch jupyter-book nbmake matplotlib seaborn ipywidgets papermill"
).split()


def requirements():
    """All direct dependencies, those of the extras included; `all` only names the other
    extras.
    """
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [
        line for name in extras if name != "all" for line in extras[name]
    ]
    return [Requirement(line) for line in lines]


def pins(lines):
    """{canonical name: version} of the lines that pin a package"""
    found = [
        re.match(r"\s*(?:- )?([\w.-]+)(?:\[[\w,]+\])?==([\w.+!]+)", line)
        for line in lines
    ]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


LOCK = pins((ROOT / "requirements.lock").read_text().splitlines())
CONDA = pins((ROOT / "environment.yml").read_text().splitlines())


@pytest.mark.parametrize(
    "requirement", requirements(), ids=lambda requirement: requirement.name
)
def test_dependency_is_locked(requirement):
    name = canonicalize_name(requirement.name)
    assert requirement.specifier.contains(LOCK[name]), (
        f"{name}=={LOCK[name]} is not {requirement.specifier}"
    )
    assert CONDA[name] == LOCK[name], (
        f"environment.yml and requirements.lock disagree about {name}"
    )


@pytest.mark.parametrize("name", FIXED)
def test_fixed_package_is_everywhere(name):
    name = canonicalize_name(name)
    assert name in {
        canonicalize_name(requirement.name) for requirement in requirements()
    }
    assert name in LOCK and name in CONDA


def test_lock_holds_versions_only():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(
        re.fullmatch(r"#.*|[\w.-]+==[\w.]+( ; sys_platform == \"linux\")?", line)
        for line in lines
    )
    assert "+" not in LOCK["torch"], (
        "torch is pinned to a public version, not to a local build"
    )


def test_all_names_every_extra():
    extras = PROJECT["optional-dependencies"]
    assert Requirement(extras["all"][0]).extras == set(extras) - {"all"}


def test_book_is_jupyter_book_1():
    assert LOCK["jupyter-book"].split(".")[0] == "1"
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    assert yaml.safe_load((ROOT / "_toc.yml").read_text())["format"] == "jb-book"


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"


def tracked():
    """The names of the files of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_address_is_everywhere_the_same():
    """What has to name it names it, and nothing names another."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert citation["repository-code"] == config["repository"]["url"] == ADDRESS
    name = re.escape(PROJECT["name"])
    pattern = re.compile(rf"(?:https?://|git@)[\w.-]+[/:][\w.-]+/{name}(?![\w-])")
    texts = {
        path: (ROOT / path).read_text(encoding="utf-8")
        for path in tracked()
        if path.endswith((".ipynb", ".md", ".py", ".toml", ".cff", ".yml"))
    }
    others = {
        (path, found)
        for path, text in texts.items()
        for found in pattern.findall(text)
        if found != ADDRESS
    }
    assert not others, others


def test_readme_example_runs(tmp_path, monkeypatch):
    """The first block of Python in README.md, as it stands there."""
    monkeypatch.chdir(tmp_path)
    source = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    exec(compile(source, "README.md", "exec"), {})
    assert (tmp_path / "pets.safetensors").exists()


def test_no_file_speaks_of_a_path_of_one_machine():
    """A home folder or an absolute path in a committed file works for its author
    alone.
    """
    pattern = re.compile(
        r"(?<![\w.:/+])/(?:(?:home|Users|root|work)/\w|tmp/ipykernel_)"
    )
    this = Path(__file__).relative_to(ROOT).as_posix()
    vendored = "book/_static/"
    guilty = []
    for name in tracked():
        path = ROOT / name
        if name == this or name.startswith(vendored) or path.stat().st_size > 8_000_000:
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        guilty += [f"{name}: {match[0]}" for match in pattern.finditer(text)]
    assert not guilty, guilty
