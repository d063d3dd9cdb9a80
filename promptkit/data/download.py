"""Downloads of the real datasets: archives that resume and are checked, unpacked safely
and put in place when whole.

By default they come from a collection on the Hugging Face Hub that holds all datasets
but ImageNet in the folders of CoOp's code, with the published split files. Where that
cannot be reached, seven can be had from the pages of their makers, as in torchvision,
without split files.
"""

import hashlib
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from filelock import Timeout
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get

from promptkit.data.archives import merge, need_space, no_space, unpack
from promptkit.data.benchmark import TABLE, data_root, remedy
from promptkit.errors import InputError, unknown
from promptkit.files import lock

HUB, REVISION = (
    "zhengli97/prompt_learning_dataset",
    "ceb3112337fb6e1bf71534e355ca5569b63f19a6",
)
ARCHIVES = {
    name: f"{entry.folder}.zip" for name, entry in TABLE.items() if name != "imagenet"
}
ARCHIVES["food101"] = "food101.zip"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
ORIGINS = {  # name: (address, MD5 where torchvision knows it)
    "caltech101": [
        (
            "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
            "3138e1922a9193bfa496528edbbc45d0",
        ),
    ],
    "oxford_pets": [
        (f"{OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
        (f"{OXFORD}/pets/data/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
    ],
    "food101": [
        (
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
            "85eeb15f3717b99a5da872d97d918f87",
        )
    ],
    "fgvc_aircraft": [
        (f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", None)
    ],
    "sun397": [
        (
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            "8ca2778205c41d23104230ba66911c7a",
        ),
        (
            "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
            None,
        ),
    ],
    "dtd": [
        (f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1")
    ],
    "eurosat": [
        (
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
        )
    ],
}


@dataclass(frozen=True)
class Remote:
    """A file to fetch; digest is of SHA-256 or MD5, by its length."""

    url: str
    name: str
    size: int | None = None
    digest: str | None = None


def download(name: str, root=None, source: str = "hub") -> Path:
    """Fetch a real dataset into its folder below a root; what has arrived stays when it
    is interrupted.

    Files of the same names are replaced, so that damaged ones are mended; others in the
    folder stay. A split file that differs from the new one is kept with ".bak" after
    its name. Where another process downloads the same, its end is waited for.

    Args:
        name: one of the benchmark's datasets or of ImageNet's shifts.
        root: by default $PROMPTKIT_DATA, else ./data.
        source: "hub", or "origin" for the page of its makers.

    Returns:
        Path: the folder.

    Raises:
        InputError: unknown name, no connection, no space, a file that differs from its
            checksum, or an archive that is damaged, unsafe or not of this dataset.
            Nothing half-written is left in the folder.
    """
    root = data_root(root)
    remotes = remotes_of(name, source)
    folder, work = root / TABLE[name].folder, root / ".downloads" / f"{name}-{source}"
    there, turn = False, lock(folder)
    try:
        turn.acquire(timeout=0)
    except Timeout:
        warnings.warn(
            f"another process downloads {TABLE[name].title}: waiting for it",
            stacklevel=2,
        )
        turn.acquire()
        there = all((folder / need).exists() for need in TABLE[name].needs)
    try:
        if not there:
            _download(name, remotes, folder, work)
    finally:
        turn.release()
    return folder


def _download(name, remotes, folder, work):
    work.mkdir(parents=True, exist_ok=True)
    archives = [fetch(remote, work) for remote in remotes]
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        for archive in archives:
            unpack(archive, unpacked)
        # Caltech101 comes as an archive of archives
        for archive in list(unpacked.glob("*/*.tar.gz")):
            unpack(archive, archive.parent)
            archive.unlink()
        found = _find(unpacked, TABLE[name].needs, archives)
        install(found, folder, TABLE[name].split_file)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()


def remotes_of(name: str, source: str = "hub") -> list[Remote]:
    """What to fetch for a dataset.

    Raises:
        InputError: unknown name or source, a dataset that is not to be had there, or no
            connection.
    """
    if name not in TABLE:
        raise unknown("real dataset", name, TABLE)
    if name == "imagenet":
        raise InputError(f"ImageNet cannot be downloaded by programs: {remedy(name)}")
    if source == "origin":
        if name not in ORIGINS:
            raise InputError(
                f"{TABLE[name].title} is not to be had from its makers any more, or not"
                " whole: use the hub"
            )
        return [
            Remote(url, url.rpartition("/")[2], None, md5) for url, md5 in ORIGINS[name]
        ]
    if source != "hub":
        raise unknown("source", source, ["hub", "origin"])
    url = hf_hub_url(
        HUB, ARCHIVES[name], revision=REVISION, endpoint=os.environ.get("HF_ENDPOINT")
    )
    try:
        found = get_hf_file_metadata(url)
    except Exception as error:  # of whichever library carries the request
        advice = " or take --source origin" if name in ORIGINS else ""
        raise InputError(
            f"cannot reach {url} ({_first_line(error)}): check the connection{advice}"
        ) from None
    digest = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None
    return [Remote(found.location, ARCHIVES[name], found.size, digest)]


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file into a folder, going on where an earlier attempt stopped; it
    bears its name when it is checked.

    Raises:
        InputError: as in :func:`download`.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists():
        return path
    have = part.stat().st_size if part.exists() else 0
    if remote.size is not None:
        if have > remote.size:
            part.unlink()
            have = 0
        # twice: the archive lies beside what is unpacked from it
        need_space(folder, 2 * remote.size - have, remote.name)
    try:
        with part.open("ab") as file:
            http_get(
                remote.url,
                file,
                resume_size=have,
                expected_size=remote.size,
                displayed_filename=remote.name,
            )
    except Exception as error:
        if getattr(error, "errno", None) == ENOSPC:
            raise no_space(folder, remote.name) from None
        raise InputError(
            f"cannot download {remote.name} from {remote.url.partition('?')[0]}"
            f" ({_first_line(error)}): check the connection and give the same command"
            f" again, it goes on after {part.stat().st_size / 1e6:.1f} MB"
        ) from None
    if remote.digest:
        with part.open("rb") as file:
            found = hashlib.file_digest(
                file, "sha256" if len(remote.digest) == 64 else "md5"
            ).hexdigest()
        if found != remote.digest:
            part.unlink()
            raise InputError(
                f"{remote.name} differs from its checksum ({found[:12]} is not"
                f" {remote.digest[:12]}) and was removed: give the same command again"
            )
    os.replace(part, path)
    return path


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _find(unpacked, needs, archives):
    """The folder that holds all of `needs`: the archive's top, or one or two folders
    below it.
    """
    level = [unpacked]
    for _ in range(3):
        for folder in level:
            if all((folder / name).exists() for name in needs):
                return folder
        level = [
            path
            for folder in level
            for path in sorted(folder.iterdir())
            if path.is_dir()
        ]
    names = " and ".join(archive.name for archive in archives)
    raise InputError(
        f"{names} does not hold {' and '.join(needs)}: it is another dataset, or laid"
        " out differently"
    )


def install(found: Path, folder: Path, split_file: str | None = None) -> None:
    """Move a folder into place, file by file if it is there already: what is of the
    same name is replaced, the rest stays.

    Args:
        split_file: the name of one that is kept beside the new one, with ".bak" after
            its name, if the two differ.
    """
    old, new = folder / (split_file or ""), found / (split_file or "")
    if split_file and old.is_file() and new.is_file():
        if old.read_bytes() != new.read_bytes():
            kept, n = old.with_name(f"{old.name}.bak"), 2
            while kept.exists():
                kept, n = old.with_name(f"{old.name}.bak{n}"), n + 1
            shutil.copy2(old, kept)
            warnings.warn(
                f"{old} was not the one that was downloaded, and is replaced; it is"
                f" kept as {kept.name}",
                stacklevel=3,
            )
    merge(found, folder)
