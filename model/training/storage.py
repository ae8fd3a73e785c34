"""Where data comes from and results go to: a folder, or s3:// and gs://, through the same library as model.fetch.

A result appears whole or not at all: on disk it is renamed into place; object storage has no such step, so an object
named `incomplete` is there first and goes last.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from app.errors import ConfigError
from model.fetch import Source, judged, persistently, put_in_place, staging
from model.training.record import RUN_FILE

INCOMPLETE = "incomplete"
DENIED = {
    "s3": "it takes s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket",
    "gs": "it takes what roles/storage.objectUser has",
}
T = TypeVar("T")


class Store:
    """`str(store)` may be printed. folder: where it is on disk, None in object storage."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError for an address of another kind."""
        self._source = Source(address)
        if self._source.scheme in ("http", "https"):
            raise ConfigError(f"{self._source}: expected s3://, gs:// or a folder: nothing can be stored there")
        self.folder = Path(self._source.address("")) if self._source.scheme == "file" else None

    def __str__(self) -> str:
        return str(self._source)

    def get(self, names: Iterable[str], into: Path) -> Path:
        """The folder that has these files: the store's own, or `into`, once they are copied there."""
        if self.folder:
            return self.folder
        for name in names:
            self._try(name, partial(self._system.get_file, self._source.address(name), str(into / name)))
        return into

    def finished(self, name: str = RUN_FILE) -> dict[str, Any] | None:
        """This JSON file of the result that is here. None if none is, or not all of it.

        Raises ConfigError for a folder with something else in it.
        """
        if self.folder:
            if not self.folder.is_dir() or not any(self.folder.iterdir()):
                return None
            if not (self.folder / name).is_file():
                raise ConfigError(f"{self}: not empty, and no result ({name} is missing); it will not be replaced")
            return dict(json.loads((self.folder / name).read_bytes()))
        if self._read(INCOMPLETE) is not None or (found := self._read(name)) is None:
            return None
        return dict(json.loads(found))

    def put(self, result: Path) -> None:
        """Copies a folder here; what was here is replaced."""
        names = [path.relative_to(result).as_posix() for path in sorted(result.rglob("*")) if path.is_file()]
        if self.folder:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with staging(self.folder) as staged:
                shutil.copytree(result, staged, copy_function=shutil.copyfile, dirs_exist_ok=True)
                for path in (*(staged / name for name in names), staged):
                    sync(path)
                put_in_place(staged, self.folder)
            sync(self.folder.parent)
            return
        mark = self._source.address(INCOMPLETE)
        self._try(INCOMPLETE, partial(self._system.pipe_file, mark, b""))
        for name in names:
            self._try(name, partial(self._system.put_file, str(result / name), self._source.address(name)))
        self._try(INCOMPLETE, partial(self._system.rm_file, mark))

    def _read(self, name: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._source.address(name)))
            except FileNotFoundError:
                return None

        return self._try(name, read)

    def _try(self, name: str, action: Callable[[], T]) -> T:
        shown = self._source.shown(name)

        def once() -> T:
            try:
                return action()
            # From whichever library: each has its own family of errors.
            except Exception as error:
                raise judged(error, self._source.scheme, shown, DENIED[self._source.scheme]) from None

        return persistently(once, shown)

    @cached_property
    def _system(self) -> Any:
        return self._source.filesystem()


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
