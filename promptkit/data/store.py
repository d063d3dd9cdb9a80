"""A dictionary of bytes in a file, which several processes may fill at once and whose
entries are checked when they are read.
"""

import sqlite3
import warnings
import zlib
from contextlib import closing
from pathlib import Path

from promptkit.errors import InputError
from promptkit.files import lock

# What a file that was cut, overwritten or made by something else leads to.
_DAMAGED = (
    "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_IOERR_SHORT_READ",
    "SQLITE_CONSTRAINT", "SQLITE_MISMATCH", "SQLITE_FORMAT",
)  # fmt: skip


class Store:
    """A dictionary {bytes: bytes} in an SQLite file.

    An entry bears a checksum; one that does not fit it counts as missing. A file that
    is damaged as a whole is removed and begun anew, with a warning. What `put` was
    given is there at once, and stays when the process is killed.

    Args:
        path (Path): the file; made when something is put in.
        title (str): what it holds, for messages.
    """

    def __init__(self, path: Path, title: str):
        self.path, self.title = Path(path), title

    def get(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Those of the keys that are there, with their values.

        Raises:
            InputError: the file cannot be read.
        """
        if not self.path.exists():
            return {}
        found, damaged = self._run(lambda db: _select(db, list(keys)), "BEGIN")
        if damaged:
            warnings.warn(
                f"{damaged} damaged entries of the {self.title} {self.path}: making"
                " them again",
                stacklevel=3,
            )
        return found

    def put(self, items: dict[bytes, bytes]) -> None:
        """Add entries, in place of those with the same keys.

        Raises:
            InputError: the file cannot be written, or there is no space left.
        """
        rows = [(key, value, _crc(key, value)) for key, value in items.items()]
        insert = "INSERT OR REPLACE INTO entry VALUES (?, ?, ?)"
        self._run(lambda db: db.executemany(insert, rows), "BEGIN IMMEDIATE")

    def _run(self, work, begin):
        try:
            return self._transact(work, begin)
        except sqlite3.DatabaseError as error:
            self._raise_unless_damaged(error)
        with lock(self.path):
            try:  # another process may have mended it by now
                return self._transact(work, begin)
            except sqlite3.DatabaseError as error:
                self._raise_unless_damaged(error)
            warnings.warn(
                f"damaged {self.title} {self.path}: making it again", stacklevel=4
            )
            for suffix in ("", "-journal"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            return self._transact(work, begin)

    def _raise_unless_damaged(self, error):
        name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
        if not name.startswith(_DAMAGED):
            raise InputError(
                f"the {self.title} {self.path} cannot be used ({error}): make room or"
                " mend its permissions, or set $PROMPTKIT_CACHE"
            ) from None

    def _transact(self, work, begin):
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with closing(db), db:
            # a crash of the machine may damage the file; one of the process does not
            db.execute("PRAGMA synchronous = OFF")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entry"
                " (key BLOB PRIMARY KEY, value BLOB, crc INTEGER)"
            )
            db.execute(begin)
            pages, size = (
                db.execute(f"PRAGMA page_{what}").fetchone()[0]
                for what in ("count", "size")
            )
            if self.path.stat().st_size != pages * size:
                raise sqlite3.DatabaseError("it was cut or added to")
            return work(db)


def _select(db, keys):
    """({key: value}, how many have a wrong checksum)."""
    found, damaged = {}, 0
    for start in range(0, len(keys), 500):  # any SQLite takes that many
        some = keys[start : start + 500]
        marks = ",".join("?" * len(some))
        for key, value, crc in db.execute(
            f"SELECT key, value, crc FROM entry WHERE key IN ({marks})", some
        ):
            if isinstance(value, bytes) and crc == _crc(key, value):
                found[key] = value
            else:
                damaged += 1
    return found, damaged


def _crc(key, value):
    return zlib.crc32(value, zlib.crc32(key))
