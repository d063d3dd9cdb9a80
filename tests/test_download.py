"""Downloads against a local server that plays the Hub; what is checked, listed and
refused.
"""

import hashlib
import io
import shutil
import stat
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from real_data import make
from rich.console import Console
from typer.testing import CliRunner

from promptkit import data
from promptkit.cli import app
from promptkit.data.benchmark import TABLE
from promptkit.data.check import check
from promptkit.data.download import (
    ARCHIVES,
    HUB,
    ORIGINS,
    REVISION,
    Remote,
    fetch,
    unpack,
)
from promptkit.errors import InputError

module = sys.modules["promptkit.data.download"]
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be compared with the papers'")


class Server(ThreadingHTTPServer):
    """Serves `files` (path: bytes) with ranges; each connection drops after `limit`
    bytes, after `times` at once.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.digests, self.limit, self.times = (
            {},
            [],
            True,
            None,
            None,
        )
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        server, path = self.server, self.path.partition("?")[0]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        server.asked.append((self.command, path, start))
        if path not in server.files:
            self.send_error(404)
            return
        body = server.files[path]
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}"
            )
        self.send_header("Content-Length", str(len(body) - start))
        if server.digests:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            times = len([1 for command, *_ in server.asked if command == "GET"])
            self.wfile.write(
                b""
                if server.times is not None and times > server.times
                else body[start:][: server.limit]
            )


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "huggingface_hub.file_download.time.sleep", lambda seconds: None
    )
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def zipped(folder, top="", extra=None):
    """The files of a folder as a zip file's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                archive.write(path, f"{top}{path.relative_to(folder)}")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(folder, top=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, top or ".")
    return buffer.getvalue()


def on_hub(server, name, folder=None, body=None, **more):
    """Put a dataset's archive on the fake Hub; returns its path there."""
    folder = folder or make(name, Path("source"))
    path = f"/{HUB}/resolve/{REVISION}/{ARCHIVES[name]}"
    server.files[path] = body or zipped(folder, f"{TABLE[name].folder}/", **more)
    return path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_dataset_comes_from_the_hub(name, server):
    on_hub(server, name)
    folder = data.benchmark.data_root("root") / TABLE[name].folder
    assert module.download(name, "root") == folder
    assert (
        tree(folder) == tree(f"source/{TABLE[name].folder}")
        and tree("root")[0] == TABLE[name].folder
    )
    here, there = data.load_dataset(name, "root"), data.load_dataset(name, "source")
    assert here.classnames == there.classnames and here.test.key == there.test.key
    assert check(name, "root").state == "differs"  # it is a small copy
    assert module.download(name, "root") == folder  # once more changes nothing
    assert tree(folder) == tree(f"source/{TABLE[name].folder}")


def test_archives_without_a_top_folder_or_with_two_serve_too(server):
    source = make("eurosat", Path("source"))
    for top in ("", "a/b/"):
        on_hub(server, "eurosat", source, body=zipped(source, top))
        module.download("eurosat", f"root{len(top)}")
        assert tree(f"root{len(top)}/eurosat") == tree(source)


def test_pickles_and_litter_are_left_out(server):
    litter = {
        "eurosat/split_fewshot/shot_1-seed_1.pkl": b"x",
        "__MACOSX/eurosat/._2750": b"x",
        "eurosat/.DS_Store": b"x",
    }
    on_hub(server, "eurosat", extra=litter | {"eurosat/preprocessed.pkl": b"x"})
    module.download("eurosat", "root")
    assert tree("root/eurosat") == tree("source/eurosat")


def test_an_interrupted_download_goes_on(server):
    path = on_hub(server, "dtd")
    size = len(server.files[path])
    server.limit, server.times = size // 10, 2
    with pytest.raises(
        InputError,
        match="cannot download dtd.zip .* same command again, it goes on after",
    ):
        module.download("dtd", "root")
    part = Path("root/.downloads/dtd-hub/dtd.zip.part")
    assert tree("root") == [
        ".downloads",
        ".downloads/dtd-hub",
        ".downloads/dtd-hub/dtd.zip.part",
    ]
    have = part.stat().st_size
    assert size // 6 <= have < size and part.read_bytes() == server.files[path][:have]
    server.limit, server.times, server.asked = None, None, []
    module.download("dtd", "root")
    assert [start for command, _, start in server.asked if command == "GET"] == [have]
    assert (
        tree("root/dtd") == tree("source/dtd") and not Path("root/.downloads").exists()
    )


def test_a_dropped_connection_is_taken_up_at_once(server):
    path = on_hub(server, "dtd")
    server.limit = len(server.files[path]) // 3
    module.download("dtd", "root")
    assert len([1 for command, *_ in server.asked if command == "GET"]) == 4 and tree(
        "root/dtd"
    ) == tree("source/dtd")


def test_ctrl_c_keeps_what_has_arrived(server, monkeypatch):
    path = on_hub(server, "dtd")

    def interrupted(url, file, **options):
        file.write(server.files[path][:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "http_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.download("dtd", "root")
    assert Path("root/.downloads/dtd-hub/dtd.zip.part").stat().st_size == 1000
    assert not Path("root/dtd").exists()


def test_a_broken_off_unpacking_leaves_nothing(server, monkeypatch):
    on_hub(server, "dtd")
    extract = zipfile.ZipFile.extract

    def interrupted(archive, member, folder):
        if "0003" in member.filename:
            raise KeyboardInterrupt
        return extract(archive, member, folder)

    monkeypatch.setattr(zipfile.ZipFile, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.download("dtd", "root")
    assert tree("root") == [
        ".downloads",
        ".downloads/dtd-hub",
        ".downloads/dtd-hub/dtd.zip",
    ]
    monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
    server.asked = []
    module.download("dtd", "root")
    assert not any(command == "GET" for command, *_ in server.asked) and tree(
        "root/dtd"
    ) == tree("source/dtd")


def test_a_wrong_checksum_is_refused(server):
    path = on_hub(server, "dtd")
    digest = hashlib.sha256(b"another file").hexdigest()
    remote = Remote(server.url + path, "dtd.zip", len(server.files[path]), digest)
    with pytest.raises(
        InputError,
        match=r"dtd.zip differs from its checksum \(\w+ is not \w+\) and was removed",
    ):
        fetch(remote, Path())
    assert not list(Path().glob("dtd.zip*"))


def test_no_space(server, monkeypatch):
    on_hub(server, "dtd")
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=1000)
    )
    with pytest.raises(
        InputError, match="dtd.zip needs .* GB more space in .*root/.*: make room there"
    ):
        module.download("dtd", "root")
    assert (
        not any(command == "GET" for command, *_ in server.asked)
        and not Path("root/dtd").exists()
    )
    monkeypatch.setattr(module.shutil, "disk_usage", disk_usage)

    def full(url, file, **options):
        file.write(b"x" * 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "http_get", full)
    with pytest.raises(InputError, match="dtd.zip needs more space"):
        module.download("dtd", "root")
    assert not Path("root/dtd").exists()


def test_no_space_to_unpack(server, monkeypatch):
    on_hub(server, "dtd")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(InputError, match="unpacking dtd.zip needs more space"):
        module.download("dtd", "root")
    assert tree("root") == [
        ".downloads",
        ".downloads/dtd-hub",
        ".downloads/dtd-hub/dtd.zip",
    ]


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "/evil.txt", "dtd/../../evil.txt", "C:/evil.txt", "..\\evil.txt"],
)
def test_zip_files_cannot_write_outside(name, server):
    on_hub(server, "dtd", extra={name: b"x"})
    with pytest.raises(
        InputError, match="unsafe archive .*dtd.zip .* is a path outside"
    ):
        module.download("dtd", "root")
    assert (
        not Path("root/dtd").exists()
        and not list(Path().rglob("evil.txt"))
        and not Path("/evil.txt").exists()
    )


def test_zip_files_cannot_link(server):
    link = zipfile.ZipInfo("dtd/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    on_hub(server, "dtd", extra={link: "/etc/passwd"})
    with pytest.raises(InputError, match="unsafe archive .*'dtd/link' is a link"):
        module.download("dtd", "root")
    assert not Path("root/dtd").exists()


@pytest.mark.parametrize("case", ["above", "absolute", "link", "hard link"])
def test_tar_files_cannot_write_or_link_outside(case, tmp_path):
    member = tarfile.TarInfo(
        {"above": "../evil.txt", "absolute": "/evil/evil.txt"}.get(case, "link")
    )
    if "link" in case:
        member.type = tarfile.SYMTYPE if case == "link" else tarfile.LNKTYPE
        member.linkname = "../../etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(InputError, match="unsafe archive .*x.tar"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    assert tree(tmp_path / "out") == [] and not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("case", ["zip", "tar", "text", "cut"])
def test_damaged_archives_are_removed(case, tmp_path):
    source = make("eurosat", tmp_path / "source")
    body = {
        "zip": zipped(source),
        "tar": tarred(source),
        "text": b"<html>not found</html>",
        "cut": zipped(source),
    }[case]
    body = {
        "zip": body[:3000] + b"xxxx" + body[3004:],
        "tar": body[: len(body) // 2],
        "cut": body[:-400],
    }.get(case, body)
    path = tmp_path / "x.zip"
    path.write_bytes(body)
    with pytest.raises(
        InputError,
        match="damaged archive x.zip .* removed: give the same command again",
    ):
        unpack(path, tmp_path / "out")
    assert not path.exists()


def test_an_archive_of_something_else(server):
    on_hub(server, "dtd", folder=make("eurosat", Path("source")))
    with pytest.raises(
        InputError, match="dtd.zip does not hold images: it is another dataset"
    ):
        module.download("dtd", "root")
    assert not Path("root/dtd").exists()


def test_no_connection(server):
    with pytest.raises(
        InputError,
        match=r"cannot reach http.*dtd.zip \(.*404.*\): check .* or take --source",
    ):
        module.download("dtd", "root")
    server.shutdown()
    server.server_close()
    with pytest.raises(
        InputError, match=r"cannot reach http.*ucf101.zip \(.*\): check the connection$"
    ):
        module.download("ucf101", "root")
    assert not Path("root").exists()


def test_what_cannot_be_downloaded():
    with pytest.raises(
        InputError,
        match="ImageNet cannot be downloaded by programs: get it from image-net.org",
    ):
        module.download("imagenet")
    with pytest.raises(
        InputError, match="unknown real dataset 'dtdd'; did you mean 'dtd'"
    ):
        module.download("dtdd")
    with pytest.raises(InputError, match="unknown source 'hup'"):
        module.download("dtd", source="hup")
    with pytest.raises(
        InputError, match="StanfordCars is not to be had from its makers"
    ):
        module.download("stanford_cars", source="origin")


def test_a_download_mends_what_it_brings_and_leaves_the_rest(server):
    on_hub(server, "eurosat")
    shutil.copytree("source/eurosat", "root/eurosat")
    shutil.rmtree("root/eurosat/2750/Forest")
    split = Path("root/eurosat/split_zhou_EuroSAT.json")
    split.write_text("{}")
    damaged = Path("root/eurosat/2750/SeaLake/SeaLake_1.jpg")
    damaged.write_bytes(damaged.read_bytes()[::-1])  # of the same size
    Path("root/eurosat/mine.txt").write_text("x")
    bak = "split_zhou_EuroSAT.json.bak"
    with pytest.warns(UserWarning, match=f"and is replaced; it is kept as {bak}"):
        module.download("eurosat", "root")
    there = tree("source/eurosat")
    assert tree("root/eurosat") == sorted([*there, "mine.txt", bak])
    for path in there:
        if Path("source/eurosat", path).is_file():
            ours, theirs = Path("root/eurosat", path), Path("source/eurosat", path)
            assert ours.read_bytes() == theirs.read_bytes()
    assert Path("root/eurosat", bak).read_text() == "{}"
    split.write_text("[]")
    with pytest.warns(UserWarning, match=f"kept as {bak}2"):
        module.download("eurosat", "root")
    assert Path("root/eurosat", bak).read_text() == "{}"
    assert Path("root/eurosat", f"{bak}2").read_text() == "[]"


# --- the pages of their makers --------------------------------------------------------


def at_origin(server, monkeypatch, name, *bodies):
    """Serve bodies under the names that the origin's files have, with right
    checksums.
    """
    entries = []
    for (url, md5), body in zip(ORIGINS[name], bodies, strict=True):
        path = "/" + url.rpartition("/")[2]
        server.files[path], server.digests = body, False
        entries.append((server.url + path, md5 and hashlib.md5(body).hexdigest()))
    monkeypatch.setitem(ORIGINS, name, entries)


def same_images(name, root="root"):
    here, there = data.load_dataset(name, root), data.load_dataset(name, "source")
    return here.test.key == there.test.key and here.classnames == there.classnames


@pytest.mark.filterwarnings("ignore:the division of")
def test_origins(server, monkeypatch):
    source = {name: make(name, Path("source"), split_file=False) for name in ORIGINS}
    inner = Path("inner")
    (inner / "caltech-101").mkdir(parents=True)
    objects = tarred(
        source["caltech101"] / "101_ObjectCategories", "101_ObjectCategories"
    )
    (inner / "caltech-101" / "101_ObjectCategories.tar.gz").write_bytes(objects)
    at_origin(server, monkeypatch, "caltech101", zipped(inner))
    pets = [
        tarred(source["oxford_pets"] / part, part) for part in ("images", "annotations")
    ]
    at_origin(server, monkeypatch, "oxford_pets", *pets)
    at_origin(server, monkeypatch, "food101", tarred(source["food101"], "food-101"))
    at_origin(
        server,
        monkeypatch,
        "fgvc_aircraft",
        tarred(source["fgvc_aircraft"], "fgvc-aircraft-2013b/data"),
    )
    lists = Path("lists")
    lists.mkdir()
    for path in source["sun397"].glob("*.txt"):
        shutil.copy(path, lists)
    at_origin(
        server,
        monkeypatch,
        "sun397",
        tarred(source["sun397"] / "SUN397", "SUN397"),
        zipped(lists),
    )
    at_origin(server, monkeypatch, "dtd", tarred(source["dtd"], "dtd"))
    at_origin(server, monkeypatch, "eurosat", zipped(source["eurosat"]))
    for name in ORIGINS:
        module.download(name, "root", "origin")
        assert same_images(name)
        assert ("home-made" in check(name, "root").note) == (name != "fgvc_aircraft")
    assert not Path("root/.downloads").exists()


def test_origins_are_checked_and_resumed(server, monkeypatch):
    source = make("eurosat", Path("source"))
    body = zipped(source)
    at_origin(server, monkeypatch, "eurosat", body)
    server.limit, server.times = len(body) // 10, 1
    with pytest.raises(InputError, match="it goes on after"):
        module.download("eurosat", "root", "origin")
    server.limit = server.times = None
    module.download("eurosat", "root", "origin")
    assert same_images("eurosat")
    server.files["/EuroSAT.zip"] = body + b"x"
    with pytest.raises(InputError, match="EuroSAT.zip differs from its checksum"):
        module.download("eurosat", "other", "origin")
    assert tree("other") == [".downloads", ".downloads/eurosat-origin"]


# --- the commands ---------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr("promptkit.cli.console.out", Console(width=250))
    monkeypatch.setattr("promptkit.cli.console.err", Console(width=250, stderr=True))


def promptkit(*words, code=0):
    done = CliRunner().invoke(app, list(map(str, words)), env={"TERM": "dumb"})
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done.stdout, done.stderr


def test_data_list(wide):
    text, _ = promptkit("data", "list")
    for name in data.list_datasets():
        assert f" {name} " in text
    assert "1,281,167" in text and "your own copy" in text


def test_data_download(server, wide):
    on_hub(server, "eurosat")
    _, said = promptkit("data", "download", "eurosat", "--root", "root")
    assert f"eurosat: differs, in {Path('root/eurosat')} (EuroSAT in" in said
    assert (
        "did you mean 'eurosat'" in promptkit("data", "download", "eurosta", code=2)[1]
    )
    assert (
        "cannot be downloaded by programs"
        in promptkit("data", "download", "imagenet", code=2)[1]
    )
    assert (
        "cannot reach"
        in promptkit("data", "download", "dtd", "--root", "root", code=2)[1]
    )


def test_data_download_skips_what_is_whole(server, wide, monkeypatch):
    make("eurosat", Path("root"))
    monkeypatch.setitem(
        TABLE, "eurosat", data.datasets.replace(TABLE["eurosat"], counts=(4, 20, 8, 12))
    )
    _, said = promptkit("data", "download", "eurosat", "--root", "root")
    assert "eurosat: ready" in said and not server.asked
    on_hub(server, "eurosat")
    promptkit("data", "download", "eurosat", "--root", "root", "--force")
    assert server.asked


def test_data_check(server, wide, monkeypatch):
    for name in ("eurosat", "dtd", "oxford_pets"):
        make(name, Path("root"), split_file=name != "oxford_pets")
    monkeypatch.setitem(
        TABLE, "eurosat", data.datasets.replace(TABLE["eurosat"], counts=(4, 20, 8, 12))
    )
    before = tree("root")
    lines = promptkit("data", "check", "--root", "root")[0].splitlines()
    row = {
        line.split()[0]: line
        for line in lines
        if line.split() and line.split()[0] in TABLE
    }
    assert set(row) == set(TABLE) and tree("root") == before
    assert " ready " in row["eurosat"] and "4 / 4" in row["eurosat"]
    assert " differs " in row["dtd"] and "4 / 47" in row["dtd"]
    assert (
        " home-made " in row["oxford_pets"]
        and "cannot be compared" in row["oxford_pets"]
    )
    assert (
        " missing " in row["ucf101"]
        and "promptkit data download ucf101 --root root" in row["ucf101"]
    )
    assert "image-net.org" in row["imagenet"]
    image = Path("root/eurosat/2750/Forest/Forest_1.jpg")
    image.write_bytes(b"x" * image.stat().st_size)
    assert " ready " in promptkit("data", "check", "eurosat", "--root", "root")[0]
    text, _ = promptkit(
        "data", "check", "eurosat", "--root", "root", "--images", code=1
    )
    assert " damaged " in text and "Forest_1.jpg" in text
    image.unlink()
    text, _ = promptkit("data", "check", "eurosat", "--root", "root", code=1)
    assert "the image is missing" in text
    assert "did you mean 'dtd'" in promptkit("data", "check", "dtb", code=2)[1]
