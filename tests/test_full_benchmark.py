"""The whole real benchmark, end to end: every method, dataset and protocol over small
folders in the true formats.
"""

import warnings

import pytest
from real_data import real_root  # noqa: F401
from rich.console import Console
from test_cli import promptkit
from test_protocols import tiny

from promptkit import data, runs
from promptkit.data.benchmark import TABLE
from promptkit.grids import benchmark
from promptkit.methods import coprompt, tpt
from promptkit.recipe import PROTOCOLS
from promptkit.registry import specs, supervision
from promptkit.results import load_results
from promptkit.views import drawn_views


def test_every_cell_of_the_table(real_root, tmp_path, monkeypatch):  # noqa: F811
    """As `promptkit reproduce --profile full --data all --root DIR --max-steps 2`, on a
    tiny CLIP.
    """
    clip = tiny(layers=3)  # as deep as the transfer recipes put prompts
    shallow = {key: (3, *rest) for key, (_, *rest) in coprompt.SETTINGS.items()}
    monkeypatch.setattr(coprompt, "SETTINGS", shallow)  # of up to nine blocks
    monkeypatch.setattr(  # half of all time would go into 64 views of each image
        tpt,
        "drawn_views",
        lambda clip, images, n, *how: drawn_views(clip, images, 4, *how),
    )
    monkeypatch.setattr(runs, "load_clip", lambda *args, **kwargs: clip)
    runs._clip.cache_clear()
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr("promptkit.cli.console.out", Console(width=200))
    monkeypatch.setattr("promptkit.cli.console.err", Console(width=200, stderr=True))
    words = [
        "reproduce",
        "--profile",
        "full",
        "--data",
        "all",
        "--root",
        real_root,
        "--max-steps",
        2,
        "--seeds",
        1,
    ]
    text, _ = promptkit(*words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = load_results()
    assert rows["value"].between(0, 100).all()
    told = {spec for spec in specs() if "texts" not in supervision(spec)}
    for protocol, part in rows.groupby("protocol"):
        cells = part.groupby(["dataset", "target", "split"])["method"].agg(set)
        assert (cells == told).all(), protocol
        assert all(name in text for name in told)
    assert set(rows["protocol"]) == set(PROTOCOLS)
    for protocol in ("few-shot", "base-to-new"):
        assert set(rows[rows["protocol"] == protocol]["dataset"]) == set(data.DATASETS)
    shifts = set(TABLE["imagenet"].shifts)
    assert (
        set(rows.query("protocol == 'domain-generalization'")["target"])
        == {"imagenet"} | shifts
    )
    assert set(rows.query("protocol == 'cross-dataset'")["target"]) == set(
        data.DATASETS
    )
    runs._clip.cache_clear()


def test_what_learns_from_absent_sentences_is_left_out(real_root, monkeypatch):  # noqa: F811
    clip = tiny(layers=3)
    monkeypatch.setattr(runs, "load_clip", lambda *args, **kwargs: clip)
    runs._clip.cache_clear()
    asked = {"protocols": ["few-shot"], "seeds": [1], "profile": "full"}
    with pytest.warns(UserWarning, match="aape, protext learn from sentences"):
        plans = benchmark(datasets=["eurosat"], root=str(real_root), **asked)
    assert not {"aape", "protext"} & {planned.config["method"] for planned in plans}
    runs._clip.cache_clear()


@pytest.mark.parametrize("missing", ["imagenet", "dtd"])
def test_a_missing_dataset_is_named_before_anything_runs(
    real_root,  # noqa: F811
    missing,
    monkeypatch,
):
    (real_root / TABLE[missing].folder).rename(real_root / "elsewhere")
    words = ["reproduce", "--profile", "full", "--root", real_root, "--model", "mini"]
    said = promptkit(*words, code=2)[1]
    assert TABLE[missing].title in said and str(real_root) in said
