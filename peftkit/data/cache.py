"""Tokenised rows on disk: named by a hash of everything they depend on, whole or not there, checked when they are read.

A file is Arrow's stream of record batches, then JSON with what was seen on the way, then the length of each and a
SHA-256 over both. It is written under a name of its own and renamed once it is complete and on the disk, so that
writers side by side and kills leave no half file under the name that is looked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from peftkit.data.examples import SCHEMA

SMALL = 2**21  # bytes; fewer are made anew as fast as they are read
TAIL = struct.Struct("<8sQQ32s")  # magic, bytes of Arrow, bytes of JSON, SHA-256 of both
MAGIC = b"peftkit1"
BLOCK = 2**22
ABANDONED = 86400  # seconds after which a file that is not whole is no longer being written


class DamagedCacheError(Exception):
    """A cache file that is not what was once written; says what is wrong with it."""


def cache_folder() -> Path:
    """`peftkit/tokenised` in HF_HOME where that is set, else in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "peftkit" / "tokenised"


def content_hash(parts: Iterable[str | bytes]) -> str:
    """One name for all the texts, where they begin and end included."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


class Store:
    """Takes record batches: kept in memory while they are few, or where there is no `path`, else written to it."""

    def __init__(self, path: Path | None):
        self.path = path
        self.batches: list[Any] = []
        self.bytes = 0
        self.part: Path | None = None  # the file while it is written
        self._sink: Any = None
        self._writer: Any = None

    def add(self, batch: Any) -> None:
        """Raises OSError where the file cannot be written."""
        self.bytes += batch.nbytes
        if self._writer is None:
            self.batches.append(batch)
            if self.path is None or self.bytes < SMALL:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for left in self.path.parent.glob("*.part"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink(missing_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.", suffix=".part")
            os.close(handle)
            self.part = Path(name)
            self._sink = pa.OSFile(name, "wb")
            self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
            waiting, self.batches = self.batches, []
        else:
            waiting = [batch]
        for waits in waiting:
            self._writer.write_batch(waits)

    def finish(self, seen: dict[str, Any]) -> Any:
        """The table of all batches; `seen` is stored with them. Raises OSError where the file cannot be written."""
        if self._writer is None or self.part is None or self.path is None:
            return pa.Table.from_batches(self.batches, SCHEMA)
        self._writer.close()
        self._sink.close()
        told = json.dumps(seen).encode()
        size = self.part.stat().st_size
        digest = _digest(self.part, size, told)
        with self.part.open("ab") as file:
            file.write(told + TAIL.pack(MAGIC, size, len(told), digest))
            file.flush()
            os.fsync(file.fileno())
        self.part.replace(self.path)
        self.part = None
        return _table(self.path, size)

    def drop(self) -> None:
        """Removes what was begun and not finished."""
        if self._sink is not None and not self._sink.closed:
            self._sink.close()
        if self.part is not None:
            self.part.unlink(missing_ok=True)


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """(table, what was seen) of a cache file; the table stays on the disk. Raises DamagedCacheError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL.size))
        tail = file.read()
        if len(tail) != TAIL.size:
            raise DamagedCacheError("it is too short")
        magic, arrow, told, digest = TAIL.unpack(tail)
        if magic != MAGIC or arrow + told + TAIL.size != size:
            raise DamagedCacheError("it does not end as such a file does")
        file.seek(arrow)
        text = file.read(told)
    if _digest(path, arrow, text) != digest:
        raise DamagedCacheError("its checksum is wrong")
    return _table(path, arrow), json.loads(text)


def _digest(path: Path, size: int, told: bytes) -> bytes:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(BLOCK, size))):
            found.update(block)
            size -= len(block)
    found.update(told)
    return found.digest()


def _table(path: Path, size: int) -> Any:
    """The first `size` bytes of the file as a table that is mapped, not read."""
    buffer = pa.memory_map(str(path)).read_buffer(size)
    return pa.ipc.open_stream(buffer).read_all()
