"""Files on a disk and objects in S3 and Cloud Storage: listing, reading, and creating what must not exist yet.

Nothing is ever overwritten or renamed: an object is there whole, or not at all. Knows nothing of plans and shards.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import fsspec
from msgspec import Struct

from app.errors import ConfigError, ServiceError, StorageError

# Those that are known to create an object only where there is none, in one step.
SCHEMES = ("file", "s3", "gs")
# That one request for a part of an object asks for.
BLOCK_BYTES = 8 << 20
STAGING = "_tmp"
File = BufferedRandom


class Input(Struct, frozen=True):
    """A file to read. version: its ETag, or where there is none the time it was written."""

    path: str
    bytes: int
    version: str


@contextmanager
def storage_errors(shown: str) -> Iterator[None]:
    """Raises StorageError for whatever a library raises, without its text, which may hold a signed address."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        raise StorageError(f"{shown}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return "permission denied"
    if kind.startswith(("NoCredentials", "PartialCredentials", "DefaultCredentials")):
        return "no credentials found, in the environment or from the cluster"
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):  # of S3
        return f"refused: {response.get('Error', {}).get('Code', kind)}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"not read or not stored: {kind}"


class Storage:
    """What is at one address. `str(storage)` is the address as it may be printed."""

    def __init__(self, url: str, name: str) -> None:
        """name: of the argument that `url` is. Raises ConfigError for an address of another kind."""
        scheme, separator, rest = url.partition("://")
        scheme = scheme if separator else "file"
        if not url or scheme not in SCHEMES:
            raise ConfigError(f"{name}: {scheme}: expected a path, s3:// or gs://")
        host, slash, path = rest.partition("/")
        self._shown = url if scheme == "file" else f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        # Its extension for other kinds of bucket asks for more permissions than this takes.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            with storage_errors(self._shown):
                # Other processes write there as well, so no listing may be remembered.
                self.system, self.path = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(f"{name}: {scheme}:// takes {error.name}; install the `scoring` extra") from None
        self._local = scheme == "file"

    def __str__(self) -> str:
        return self._shown

    def is_inside(self, other: "Storage") -> bool:
        """Whether it is at the other's address, or below."""
        return f"{self.path}/".startswith(f"{other.path.rstrip('/')}/")

    def find(self) -> list[Input]:
        """The file at the address, or all in the folder, that match the pattern, or that begin so; sorted. Without
        those whose name, or a folder's of theirs, begins with `_` or `.`."""
        system, path = self.system, self.path
        # Where what is matched begins: names that were asked for as such may begin as they like.
        begins = re.split(r"[*?\[]", path)[0].rfind("/") + 1
        with storage_errors(self._shown):
            if system.isfile(path):
                return [_input(system.info(path))]
            if re.search(r"[*?\[]", path):
                found = system.glob(path, detail=True)
            elif system.isdir(path):
                found, begins = system.find(path, detail=True), len(path.rstrip("/")) + 1
            else:
                found = system.glob(f"{path}*", detail=True)
        files = [info for info in found.values() if info["type"] == "file"]
        seen = [info for info in files if not re.search(r"(^|/)[_.]", info["name"][begins:])]
        return sorted((_input(info) for info in seen), key=lambda each: each.path)

    def version(self, path: str) -> str:
        """Of a file that `find` found, as it is now."""
        with storage_errors(path):
            return _input(self.system.info(path)).version

    def open(self, path: str) -> BufferedReader:
        """A file that `find` found, to be read in parts."""
        return BufferedReader(self.system.open(path, "rb", block_size=BLOCK_BYTES), 1 << 20)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def names(self, folder: str = "") -> set[str]:
        """The names of what lies in a folder of it; none if there is no such folder."""
        path = self._at(folder).rstrip("/")
        with storage_errors(f"{self}/{folder}"):
            try:
                return {each["name"].rpartition("/")[2] for each in self.system.ls(path, detail=True)} - {""}
            except FileNotFoundError:
                return set()

    def exists(self, name: str) -> bool:
        with storage_errors(f"{self}/{name}"):
            return bool(self.system.exists(self._at(name)))

    def read(self, name: str) -> bytes:
        with storage_errors(f"{self}/{name}"):
            return bytes(self.system.cat_file(self._at(name)))

    def read_all(self, names: list[str]) -> list[bytes]:
        """Several at once."""
        if not names:
            return []
        with storage_errors(str(self)):
            paths = [self._at(name) for name in names]
            found = self.system.cat(paths) if len(paths) > 1 else {paths[0]: self.system.cat_file(paths[0])}
            return [bytes(found[path]) for path in paths]

    def digest(self, name: str) -> tuple[str, int]:
        """sha256 and size in bytes."""
        with storage_errors(f"{self}/{name}"), self.open(self._at(name)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()

    @contextmanager
    def staged(self) -> Iterator[File]:
        """An empty file for what will be created: on the disk itself where the address is on one, else on any."""
        parent = self._at(STAGING) if self._local else None
        with storage_errors(f"{self}/{STAGING}" if parent else tempfile.gettempdir()):
            if parent:
                Path(parent).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
        with folder, (Path(folder.name) / "staged").open("w+b") as file:
            yield file

    def create(self, name: str, file: File) -> bool:
        """Whether the staged file has become `name`; False if there is one, which stays as it is."""
        path = self._at(name)
        with storage_errors(f"{self}/{name}"):
            file.flush()
            try:
                if self._local:
                    os.fsync(file.fileno())
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    os.link(file.name, path)
                else:
                    self.system.put_file(file.name, path, mode="create")
            # S3 says that a precondition failed, others that it exists; or the answer to this very call was lost.
            except Exception:
                if not self.system.exists(path):
                    raise
                return False
        return True

    def create_bytes(self, name: str, data: bytes) -> bool:
        """As `create`."""
        with self.staged() as file:
            file.write(data)
            return self.create(name, file)

    def tidy(self) -> None:
        """Removes what killed processes left half written. A live one that still writes has lost."""
        if self._local:
            shutil.rmtree(self._at(STAGING), ignore_errors=True)


def _input(info: dict[str, Any]) -> Input:
    version = next(info[key] for key in ("ETag", "etag", "mtime") if info.get(key) is not None)
    return Input(info["name"], int(info["size"]), str(version).strip('"'))
