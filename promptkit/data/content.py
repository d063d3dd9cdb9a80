"""What files hold: digests of their content, computed once and remembered for as long
as size and times of a file stay.
"""

import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from promptkit.data.store import Store
from promptkit.errors import InputError
from promptkit.files import cache_folder

_STAMP = struct.Struct("<qqq")  # size in bytes, times of change in ns
# A file system's clock ticks in steps: a file that is changed twice within one keeps
# its times, so what was changed just now is not remembered.
_TICK = 0.02


def workers() -> ThreadPoolExecutor:
    """Threads that read, decode and resize images; these leave Python's lock to others
    while they do.
    """
    return _workers(os.getpid())  # threads do not survive a fork


@lru_cache(1)
def _workers(process):
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "images")


def ahead(read: Callable, batches: Iterable, most: int = 2) -> Iterator:
    """``map(read, batches)`` in order, by a thread that is up to ``most`` batches
    ahead: images are decoded and cropped while the device works.
    """
    reading, thread = deque(), ThreadPoolExecutor(1, "batches")
    try:
        for indices in batches:
            reading.append(thread.submit(read, indices))
            if len(reading) > most:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


class Digests:
    """Digests of the files of a folder by their content, 16 bytes each.

    They are kept in the cache folder, with each file's size and times of change: the
    second time files are looked at, not read.

    Args:
        folder (Path): where paths start.
    """

    def __init__(self, folder: Path):
        self.folder, self._seen = Path(folder), {}
        self._start = str(folder)  # joining paths takes longer than looking at files

    def of(self, paths: list[str]) -> list[bytes]:
        """The digest of each file.

        Raises:
            InputError: a file is missing, empty, cannot be read or changes meanwhile.
        """
        stamps = self._stamps(paths)
        if new := self._unknown(stamps):
            self._recall(new)
            self._read(self._unknown(stamps))
        return [self._seen[path][_STAMP.size :] for path in paths]

    def _unknown(self, stamps):
        return [
            path
            for path, stamp in stamps.items()
            if stamp is None or self._seen.get(path, b"")[: _STAMP.size] != stamp
        ]

    def _stamps(self, paths):
        """{path: stamp} by asking the file system alone."""
        paths = list(dict.fromkeys(paths))
        parts = [paths[n : n + 2000] for n in range(0, len(paths), 2000)]
        found = workers().map(lambda part: [self._stamp(path) for path in part], parts)
        return dict(zip(paths, (s for part in found for s in part), strict=True))

    def _stamp(self, path):
        try:
            return _stamp(os.stat(os.path.join(self._start, path)))
        except OSError:
            return None  # it is read next, which says what is wrong

    @property
    def _store(self):
        name = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:24]
        return Store(cache_folder("digests") / f"{name}.sqlite", "cache of digests")

    def _recall(self, paths):
        keys = {os.fsencode(path): path for path in paths}
        for key, value in self._store.get(list(keys)).items():
            if len(value) == _STAMP.size + 16:
                self._seen[keys[key]] = value

    def _read(self, paths):
        bar = tqdm(
            total=len(paths), desc="reading files", unit="file", delay=2, leave=False
        )
        with bar:
            for start in range(0, len(paths), 512):
                some = paths[start : start + 512]
                for path, value in zip(
                    some, workers().map(self._digest, some), strict=True
                ):
                    self._seen[path] = value
                    bar.update()
                self._remember(some)

    def _remember(self, paths):
        """For later processes; a killed one keeps what it has."""
        now, lasting = time.time_ns(), {}
        for path in paths:
            stamp, digest = self._seen[path][: _STAMP.size], self._seen[path][-16:]
            if abs(now - max(_STAMP.unpack(stamp)[1:])) > _TICK * 1e9:
                lasting[os.fsencode(path)] = stamp + digest
            else:
                self._seen[path] = bytes(_STAMP.size) + digest  # of no file's stamp
        self._store.put(lasting)

    def _digest(self, path):
        path = self.folder / path
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, _blake2b).digest()
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            raise InputError(f"there is no image {path}; get the files again") from None
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})") from None
        if before.st_size == 0:
            raise InputError(f"the image is empty: {path}; get the files again")
        if _stamp(before) != _stamp(after):
            raise InputError(
                f"{path} changed while it was read: wait until it is written, and give"
                " the same command again"
            )
        return _stamp(after) + digest


def _blake2b():
    return hashlib.blake2b(digest_size=16)


def _stamp(stat):
    return _STAMP.pack(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
