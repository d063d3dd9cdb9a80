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
        return self._run(self._get, list(keys)) if self.path.exists() else {}

    def put(self, items: dict[bytes, bytes]) -> None:
        """Add entries, in place of those with the same keys.

        Raises:
            InputError: the file cannot be written, or there is no space left.
        """
        self._run(self._put, items)

    def _get(self, db, keys):
        found = {}
        for start in range(0, len(keys), 500):  # SQLite takes 999 at least
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            rows = db.execute(
                f"SELECT key, value, crc FROM entry WHERE key IN ({marks})", some
            )
            found |= {
                key: value
                for key, value, crc in rows
                if isinstance(value, bytes)
                and crc == zlib.crc32(value, zlib.crc32(key))
            }
        return found

    def _put(self, db, items):
        rows = [(k, v, zlib.crc32(v, zlib.crc32(k))) for k, v in items.items()]
        db.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", rows)

    def _run(self, work, argument):
        try:
            return self._try(work, argument)
        except sqlite3.DatabaseError as error:
            self._raise_unless_damaged(error)
        with lock(self.path):
            try:  # another process may have mended it by now
                return self._try(work, argument)
            except sqlite3.DatabaseError as error:
                self._raise_unless_damaged(error)
            warnings.warn(
                f"damaged {self.title} {self.path}: making it again", stacklevel=4
            )
            for suffix in ("", "-journal"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            return self._try(work, argument)

    def _raise_unless_damaged(self, error):
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
        if not name.startswith(_DAMAGED):
            raise InputError(
                f"the {self.title} {self.path} cannot be used ({error}): make room or"
                " mend its permissions, or set $PROMPTKIT_CACHE"
            ) from None

    def _try(self, work, argument):
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            # a crash of the machine may damage the file; one of the process does not
            db.execute("PRAGMA synchronous = OFF")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entry"
                " (key BLOB PRIMARY KEY, value BLOB, crc INTEGER)"
            )
            return work(db, argument)
