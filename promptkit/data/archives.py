"""Zip and tar files of images, unpacked as a whole or not at all."""

import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from errno import ENOSPC
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from promptkit.errors import InputError

# What file managers leave, and pickles, which are of no use here and never read.
SKIPPED = re.compile(
    r"(^|/)(__MACOSX|split_fewshot)/|(^|/)(\.DS_Store|\._[^/]*)$|\.pkl$"
)


class Damaged(Exception):
    """An archive that cannot be unpacked as it is, but may arrive well another time."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file into a folder, beside what is there already; pickles and
    what file managers leave are skipped.

    Everything is unpacked beside the folder first, so a failure leaves nothing.

    Raises:
        InputError: it is damaged (and then removed), encrypted, does not fit the disk,
            holds links or devices, or has paths that lead outside, are too long or do
            not fit each other.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise InputError(f"there is no archive {archive}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    work.chmod(0o755)  # a temporary folder is private, data are not
    try:
        _extract(archive, work)
        merge(work, folder)
    except Damaged as error:
        archive.unlink()
        raise InputError(
            f"damaged archive {archive.name} ({error}), removed: give the same command"
            " again"
        ) from None
    except OSError as error:
        if error.errno == ENOSPC:
            raise no_space(folder, f"unpacking {archive.name}") from None
        raise InputError(
            f"cannot unpack {archive} ({error.strerror}: {error.filename}): nothing of"
            " it was put in place"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def merge(found: Path, folder: Path) -> None:
    """Move what a folder holds into another, in place of files of the same names.

    Raises:
        InputError: a file stands where a folder should, or the other way round.
    """
    paths = sorted(found.rglob("*"))
    for path in paths:
        target = folder / path.relative_to(found)
        if target.exists() and target.is_dir() != path.is_dir():
            kind = "a folder" if target.is_dir() else "a file"
            raise InputError(
                f"{target} is {kind} where {'a folder' if path.is_dir() else 'a file'}"
                " belongs: move it away"
            )
    if not folder.exists():
        shutil.move(found, folder)  # to another disk too, where links lead to one
        return
    for path in paths:
        target = folder / path.relative_to(found)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.move(path, target)


def need_space(folder: Path, needed: int, what: str) -> None:
    """InputError unless the disk of `folder` has `needed` bytes left."""
    if shutil.disk_usage(folder).free < needed:
        raise no_space(folder, what, needed)


def no_space(folder: Path, what: str, needed: int | None = None) -> InputError:
    """The error for a disk that is full."""
    amount = "" if needed is None else f" {needed / 1e9:.2g} GB"
    return InputError(
        f"{what} needs{amount} more space in {folder.resolve()}: make room there, or"
        " choose another --root"
    )


def _extract(archive, folder):
    try:
        if tarfile.is_tarfile(archive):
            need_space(folder, archive.stat().st_size, f"unpacking {archive.name}")
            _extract_tar(archive, folder)
        elif zipfile.is_zipfile(archive):
            _extract_zip(archive, folder)
        else:
            raise Damaged("it is neither a zip nor a tar file")
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:
        if isinstance(error, InputError):
            raise
        text = str(error).strip() or type(error).__name__
        raise Damaged(text.splitlines()[0]) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(str(error)) from None  # as gzip and bz2 say it


def _extract_zip(archive, folder):
    with zipfile.ZipFile(archive) as opened:
        members, kinds = opened.infolist(), {}
        for member in members:
            member.filename = member.filename.replace("\\", "/")
            mode = member.external_attr >> 16
            plain = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
            what = "" if plain else "a link" if stat.S_ISLNK(mode) else "a device"
            _refuse_unsafe(archive, member.filename, what, member.is_dir(), kinds)
            if member.flag_bits & 1:
                raise InputError(
                    f"the archive {archive} is encrypted: unpack it by hand"
                )
        members = [m for m in members if not SKIPPED.search(m.filename)]
        needed = sum(member.file_size for member in members)
        need_space(folder, needed, f"unpacking {archive.name}")
        for member in _bar(members, archive):
            path = Path(opened.extract(member, folder))
            if not member.is_dir() and path.stat().st_size != member.file_size:
                raise Damaged(f"{member.filename} is not of the size it should have")


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; to tarfile it is the end, if it is not
    the first.
    """

    @classmethod
    def fromtarfile(cls, opened):
        try:
            return super().fromtarfile(opened)
        except (
            tarfile.InvalidHeaderError,
            tarfile.TruncatedHeaderError,
            tarfile.EmptyHeaderError,
        ) as error:
            raise tarfile.ReadError(f"damaged or cut: {error}") from None


def _extract_tar(archive, folder):
    with tarfile.open(archive, tarinfo=_Member) as opened:
        kinds = {}
        for member in _bar(opened, archive):
            what = (
                "a link"
                if member.issym() or member.islnk()
                else ""
                if (member.isreg() and not member.issparse()) or member.isdir()
                else "a device or a file with gaps"
            )
            _refuse_unsafe(archive, member.name, what, member.isdir(), kinds)
            if not SKIPPED.search(member.name):
                opened.extract(member, folder, filter="data")
        # what follows the last member bears the checksum of a compressed file
        while opened.fileobj.read(1 << 20):
            pass


def _bar(members, archive):
    return tqdm(members, desc=f"unpacking {archive.name}", unit="file")


def _refuse_unsafe(archive, name, what, is_folder, kinds):
    """InputError for a member that is no plain file or folder inside.

    Args:
        what: names the kind of a member that is neither.
        kinds: {path: whether it is a folder} of the members before.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    parts = path.parts
    if path.is_absolute() or ".." in parts or re.match("[A-Za-z]:", str(path)):
        what = "a path outside"
    elif len(parts) > 40 or any(len(os.fsencode(part)) > 255 for part in parts):
        what = "a name too long"
    elif not what and parts:
        for n in range(1, len(parts) + 1):
            folder = n < len(parts) or is_folder
            if kinds.setdefault(parts[:n], folder) != folder:
                what = "a file and a folder at once"
    if what:
        raise InputError(
            f"unsafe archive {archive} ({name[:80]!r} is {what}): nothing of it was put"
            " in place, do not use it"
        )
