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
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path, PurePosixPath

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from promptkit.data.benchmark import TABLE, data_root, remedy
from promptkit.errors import InputError, unknown

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
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
        )
    ],
}
SKIPPED = re.compile(
    r"(^|/)(__MACOSX|split_fewshot)/|(^|/)\.DS_Store$|\.pkl$"
)  # pickles are of no use here: never read


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

    Files that are in the folder already stay there if they have the size of the new
    ones.

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
    work.mkdir(parents=True, exist_ok=True)
    archives = [fetch(remote, work) for remote in remotes]
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        for archive in archives:
            unpack(archive, unpacked)
        for archive in list(
            unpacked.glob("*/*.tar.gz")
        ):  # Caltech101 comes as an archive of archives
            unpack(archive, archive.parent)
            archive.unlink()
        install(_find(unpacked, TABLE[name].needs, archives), folder)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()
    return folder


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
            raise _no_space(folder, remote.name) from None
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


def need_space(folder: Path, needed: int, what: str) -> None:
    """InputError unless the disk of `folder` has `needed` bytes left."""
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(folder, what, needed)


def _no_space(folder, what, needed=None):
    amount = "" if needed is None else f" {needed / 1e9:.2g} GB"
    return InputError(
        f"{what} needs{amount} more space in {folder.resolve()}: make room there, or"
        " choose another --root"
    )


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- unpacking ------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file; pickles and what file managers leave are skipped.

    Raises:
        InputError: it is damaged (and then removed), does not fit the disk, or would
            write or link outside `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                members = [
                    member
                    for member in opened.infolist()
                    if not SKIPPED.search(member.filename)
                ]
                for member in members:
                    _refuse_unsafe(member, archive)
                need_space(
                    folder,
                    sum(member.file_size for member in members),
                    f"unpacking {archive.name}",
                )
                for member in _bar(members, archive):
                    opened.extract(member, folder)
        elif tarfile.is_tarfile(archive):
            need_space(folder, archive.stat().st_size, f"unpacking {archive.name}")
            with tarfile.open(archive) as opened:
                for member in _bar(opened, archive):
                    if not SKIPPED.search(member.name):
                        opened.extract(member, folder, filter="data")
        else:
            raise zipfile.BadZipFile("it is neither a zip nor a tar file")
    except tarfile.FilterError as error:
        raise InputError(
            f"unsafe archive {archive} ({error}): nothing of it was put in place, do"
            " not use it"
        ) from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        archive.unlink()
        raise InputError(
            f"damaged archive {archive.name} ({_first_line(error)}), removed: give the"
            " same command again"
        ) from None
    except OSError as error:
        raise (
            _no_space(folder, f"unpacking {archive.name}")
            if error.errno == ENOSPC
            else error
        ) from None


def _bar(members, archive):
    return tqdm(members, desc=f"unpacking {archive.name}", unit="file")


def _refuse_unsafe(member, archive):
    path = PurePosixPath(member.filename.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        what = "a path outside" if outside else "a link"
        raise InputError(f"unsafe archive {archive} ({member.filename!r} is {what}): nothing of it was put in place, "
                         "do not use it")  # fmt: skip


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


def install(found: Path, folder: Path) -> None:
    """Move a folder into place: whole, or file by file beside what is there already."""
    if not folder.exists():
        os.replace(found, folder)
        return
    for path in sorted(found.rglob("*")):
        target = folder / path.relative_to(found)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif not target.exists() or target.stat().st_size != path.stat().st_size:
            os.replace(path, target)
