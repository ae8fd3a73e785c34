"""Object storage → an artifact folder: `python -m model.fetch URL DIR [--digest SHA256] [--public-key PEM]`.

URL is the folder that holds manifest.json: https://, s3://, gs:// or a path. DIR appears complete and verified, or not
at all; where keys are given, with all that its signature lists. Exit 0; 2 bad usage; 3 what is there is not a valid
artifact; 5 it could not be fetched or stored. Each library finds its own credentials; nothing printed holds any.
"""

import argparse
import errno
import fcntl
import logging
import os
import posixpath
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import fsspec
from fsspec.callbacks import Callback
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from app.artifact.integrity import verify_files
from app.artifact.manifest import MANIFEST, Artifact, path_inside, read_artifact
from app.artifact.signature import MAX_SIGNATURE_BYTES, SIGNATURE, read_public_keys, read_signature, verify_signature
from app.errors import ArtifactError, ConfigError, StartupError, StorageError, one_line

T = TypeVar("T")
ATTEMPTS = 6
CONNECT_SECONDS = 10
# Between two pieces of a file, not for the whole: a large model may take as long as it needs.
READ_SECONDS = 30
# For the whole: 20 GB at 12 MB/s. A server that sends a byte now and then would never come to the limit above.
TIMEOUT_SECONDS = 1800
MAX_TIMEOUT_SECONDS = 7 * 86400
PROGRESS_SECONDS = 10
MAX_MANIFEST_BYTES = 16 << 20
# Of a file that is signed but not in the manifest, which has the sizes of all others: cards, licences.
MAX_BESIDE_BYTES = 64 << 20
# As the server's setting, so that a Pod's environment says it to both.
PUBLIC_KEY_VARIABLE = "APP_MODEL_PUBLIC_KEY"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What may go away by itself, of those that say the request was wrong.
PASSING_STATUSES = (408, 425, 429)
DENIED = {
    "https": "check the address's signature and when it expires",
    "http": "check the address",
    "s3": "reading needs s3:GetObject; without s3:ListBucket, S3 says so of an object that does not exist, too",
    "gs": "reading needs storage.objects.get, as in roles/storage.objectViewer",
    "file": "check its owner and mode",
}


class FetchError(StorageError):
    """The artifact could not be fetched or stored. The message names the object and what to do, never a secret."""


class OutOfTime(BaseException):
    """The whole took too long. Like KeyboardInterrupt no Exception, which libraries catch."""


class Source:
    """A folder of objects. `str(source)` has neither the credentials nor the query string of its address."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if the address is of no kind that is served."""
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ConfigError("URL: not a valid address") from None
        self.scheme = parts.scheme or "file"
        if not url or self.scheme not in DENIED or (self.scheme != "file" and not parts.hostname):
            raise ConfigError(f"URL: {self.scheme}: expected https://, s3:// or gs:// with a host or bucket, or a path")
        self._web = self.scheme in ("https", "http")
        if self.scheme == "file":
            base = shown = unquote(parts.path) if parts.scheme else url
        else:
            base = f"{self.scheme}://{parts.netloc}{parts.path}"
            shown = f"{self.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            if parts.fragment or (parts.query and not self._web):
                raise ConfigError(f"URL: {shown}: expected nothing behind the path, found a query or a fragment")
        self._base, self._shown = base.rstrip("/") or "/", shown.rstrip("/") or "/"
        # A shared-access signature that covers a folder goes with each of its objects.
        self._query = f"?{parts.query}" if self._web and parts.query else ""

    def __str__(self) -> str:
        return self._shown

    def shown(self, name: str) -> str:
        """The address of an object, as it may be printed."""
        return posixpath.join(self._shown, name)

    def address(self, name: str) -> str:
        """The address of an object, with whatever secret the user put in it."""
        return posixpath.join(self._base, quote(name) if self._web else name) + self._query

    def filesystem(self) -> Any:
        """fsspec's, which tries each thing once, for so long. Raises FetchError if it is not configured."""
        # Its extension for other kinds of bucket asks for more permissions than reading takes.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        botocore = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
        }
        # trust_env: as a cluster's proxy is told to everything else.
        web: dict[str, Any] = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        options: dict[str, dict[str, Any]] = {
            # One stream, not ten parts of 50 MB in memory.
            "s3": {"config_kwargs": botocore, "max_concurrency": 1},
            "gs": {"requests_timeout": timeout, "session_kwargs": {"trust_env": True}},
            "https": web,
            "http": web,
            "file": {},
        }
        try:
            system = fsspec.filesystem(self.scheme, skip_instance_cache=True, **options[self.scheme])
        # Each library has its own way to fail for want of configuration.
        except Exception as error:
            raise FetchError(f"{self}: cannot be opened: {type(error).__name__}; check the credentials") from None
        if self.scheme == "s3":
            system.retries = 1  # of its own, within each of ours
        return system

    def open(self) -> Callable[[str, Path, Callback], None]:
        """`get(name, path, callback)`, which downloads one object in one try."""
        system = self.filesystem()
        each: dict[str, Any] = {"concurrency": 1} if self.scheme == "gs" else {}

        def get(name: str, path: Path, callback: Callback) -> None:
            system.get_file(self.address(name), str(path), callback=callback, **each)

        return get


class Progress(Callback):  # type: ignore[misc]
    """Says how far a long download is, and ends one that is larger than the manifest says before it fills the disk."""

    def __init__(self, shown: str, limit_bytes: int) -> None:
        super().__init__()
        self._shown = shown
        self._limit_bytes = limit_bytes
        self._next = time.monotonic() + PROGRESS_SECONDS

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._limit_bytes:
            raise ArtifactError(f"{self._shown}: size mismatch: expected {self._limit_bytes} bytes, found more")
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            say(f"{self._shown}: {self.value / 1e6:.1f} of {self._limit_bytes / 1e6:.1f} MB")


class Passing(Exception):
    """A try that failed in a way that may pass. Its message may be printed."""


def fetch(
    url: str,
    folder: Path,
    digest: str = "",
    attempts: int = ATTEMPTS,
    timeout_seconds: float = TIMEOUT_SECONDS,
    public_key: Path | None = None,
) -> Artifact:
    """Makes `folder` the artifact at `url`; if it is that already, nothing is downloaded but the manifest, and with
    `public_key` the signature.

    With `digest`, not even these. Raises ConfigError, ArtifactError or FetchError, and leaves `folder` as it was. Only
    in the main thread, which SIGALRM interrupts.
    """
    source = Source(url)
    if source.scheme == "http" and not digest:
        raise ConfigError("URL: http:// proves nothing of what it delivers: use https://, or --digest")
    if public_key is not None:
        read_public_keys(public_key)
    folder = folder.absolute()
    if digest and (artifact := complete(folder, digest, public_key)):
        say(f"{folder}: already complete, digest {digest}")
        return artifact
    started = time.monotonic()
    try:
        check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging(folder) as staged:
            try:
                with time_limit(timeout_seconds):
                    return _fill(source, folder, staged, digest, attempts, public_key)
            except ArtifactError as error:
                raise ArtifactError(str(error).replace(one_line(str(staged)), str(source))) from None
            except OutOfTime:
                came = f"{came_so_far(staged)} in {time.monotonic() - started:.1f} s"
                raise FetchError(f"{source}: given up: {came}; --timeout-seconds allows more") from None
    except OSError as error:
        raise FetchError(f"{folder}: cannot be written: {error.strerror or type(error).__name__}") from None


def _fill(source: Source, folder: Path, staged: Path, digest: str, attempts: int, public_key: Path | None) -> Artifact:
    get = source.open()
    signed: dict[str, str] = {}
    if public_key is not None:
        download(get, source, SIGNATURE, staged, MAX_SIGNATURE_BYTES, attempts, exact=False)
        signed = read_signature(staged, public_key).files()
    download(get, source, MANIFEST, staged, MAX_MANIFEST_BYTES, attempts, exact=False)
    artifact = read_artifact(staged, digest)
    if done := complete(folder, artifact.digest, public_key):
        say(f"{folder}: already complete, digest {artifact.digest}")
        return done
    listed = artifact.manifest.files
    for name in [*listed, *(each for each in signed if each not in listed and each != MANIFEST)]:
        path_inside(staged, name).parent.mkdir(parents=True, exist_ok=True)
        limit_bytes = listed[name].bytes if name in listed else MAX_BESIDE_BYTES
        download(get, source, name, staged, limit_bytes, attempts, exact=name in listed)
    verify_files(artifact, verify_signature(staged, public_key) if public_key is not None else None)
    put_in_place(staged, folder)
    say(f"{folder}: {artifact.manifest.name} {artifact.manifest.version}, digest {artifact.digest}")
    return Artifact(folder, artifact.manifest, artifact.digest)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what runs for longer, also where it waits for a library."""

    def interrupt(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def came_so_far(staged: Path) -> str:
    """How much of the artifact is in `staged`; of how much, if its manifest is."""
    found = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    try:
        files = read_artifact(staged).manifest.files
    except ArtifactError:
        return f"{found / 1e6:.1f} MB"
    return f"{found / 1e6:.1f} of {sum(entry.bytes for entry in files.values()) / 1e6:.1f} MB"


def download(
    get: Callable[[str, Path, Callback], None],
    source: Source,
    name: str,
    folder: Path,
    limit_bytes: int,
    attempts: int,
    *,
    exact: bool,
) -> None:
    """One object into `folder`, tried again with backoff if it failed for a reason that may pass. exact: whether it has
    as many bytes as `limit_bytes`."""
    shown, path = source.shown(name), folder / name

    def once() -> None:
        progress = Progress(shown, limit_bytes)
        try:
            get(name, path, progress)
        except StartupError:
            raise
        # From whichever library: each has its own family of errors, and their texts may hold signed addresses.
        except Exception as error:
            raise judged(error, source.scheme, shown) from None
        # Nobody said how long it is: it may have been cut. One that is too short by its own word fails the checksum.
        if exact and progress.size is None and source.scheme != "file":
            found = path.stat().st_size
            if found < limit_bytes:
                raise Passing(f"ended after {found} of {limit_bytes} bytes")

    started = time.monotonic()
    persistently(once, shown, attempts)
    say(f"{shown}: {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")


def persistently(once: Callable[[], T], shown: str, attempts: int = ATTEMPTS) -> T:
    """Tries again, with growing pauses, while it raises Passing. Raises FetchError in the end."""

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        reason, seconds = state.outcome.exception(), state.next_action.sleep
        say(f"{shown}: {reason}; try {state.attempt_number} of {attempts}, the next in {seconds:.1f} s")

    try:
        return Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.5, max=20) + wait_random(0, 0.5),
            retry=retry_if_exception_type(Passing),
            before_sleep=before_sleep,
            reraise=True,
        )(once)
    except Passing as error:
        raise FetchError(f"{shown}: {error}; given up after {attempts} tries") from None


def judged(error: Exception, scheme: str, shown: str, denied: str = "") -> Exception:
    """What a library's error means: FetchError if it will not pass, else Passing. denied: what to check if it was."""
    status, kind = status_of(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return FetchError(f"{shown}: cannot be stored: {os.strerror(error.errno)}")
    if isinstance(error, TimeoutError):
        return Passing(kind)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FetchError(f"{shown}: not found; check the address, and that the upload was complete")
    if isinstance(error, PermissionError) or status in (401, 403):
        code = s3_code(error)
        return FetchError(f"{shown}: permission denied{f' ({code})' if code else ''}; {denied or DENIED[scheme]}")
    if kind.startswith(("NoCredentials", "PartialCredentials", "DefaultCredentials")):
        return FetchError(f"{shown}: no credentials found for {scheme}://, in the environment or from the cluster")
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUSES:
        return FetchError(f"{shown}: refused: HTTP {status}")
    for step in chain(error):
        # By the word, because aiohttp's error of this kind is one by name, without it.
        if isinstance(step, ssl.SSLCertVerificationError) and (word := getattr(step, "verify_message", "")):
            return FetchError(f"{shown}: the server's certificate is not trusted: {word}")
    if isinstance(error, ValueError):
        return FetchError(f"{shown}: refused: {kind}; check the address")
    return Passing(f"HTTP {status}" if status is not None else f"{kind}{cause_of(error)}")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it wraps, from the outside in."""
    step: BaseException | None = error
    while step is not None:
        yield step
        inner = getattr(step, "certificate_error", None) or getattr(step, "os_error", None)  # aiohttp
        step = inner or step.__cause__ or step.__context__


def cause_of(error: BaseException) -> str:
    """The system's word on what went wrong with a connection. "" if there is none."""
    for step in chain(error):
        if isinstance(step, socket.gaierror):
            return f": {step.strerror}"
        if isinstance(step, OSError) and step.errno and step.errno > 0:
            return f": {os.strerror(step.errno)}"
    return ""


def s3_code(error: BaseException) -> str:
    """The name that S3 gives its error, such as AccessDenied or ExpiredToken. "" if it is not S3's."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a library's error stands for, or that of the error behind it."""
    found: object = None
    if isinstance(error, aiohttp.ClientResponseError):
        found = error.status
    elif type(error).__name__ == "HttpError":  # gcsfs
        found = getattr(error, "code", None)
    elif str(error).startswith("Forbidden: "):  # gcsfs
        found = 403
    elif isinstance(response := getattr(error, "response", None), dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if found is None and error.__cause__ is not None:
        return status_of(error.__cause__)
    return int(str(found)) if str(found).isdigit() else None


def complete(folder: Path, digest: str, public_key: Path | None = None) -> Artifact | None:
    """The artifact in `folder`, if it is the one with this digest, every file is sound, and one of the keys signed it.

    Raises ConfigError for the file of keys.
    """
    try:
        signed = verify_signature(folder, public_key) if public_key is not None else None
        artifact = read_artifact(folder, digest)
        verify_files(artifact, signed)
    except ArtifactError:
        return None
    return artifact


def check_replaceable(folder: Path) -> None:
    """Raises ConfigError unless `folder` is missing, empty or an artifact: a mistyped DIR costs nobody their files."""
    if not folder.is_symlink() and not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; DIR is where the artifact will be")
    if folder.is_mount():
        raise ConfigError(f"{folder}: a mount point cannot be replaced; DIR must be a folder inside it")
    if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder}: not empty and no artifact ({MANIFEST} is missing); it will not be replaced")


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, on its volume, that is gone at the end. What killed processes left is removed first."""
    prefix = f".{folder.name}.fetch-"
    for left in [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)
    outer = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with locked(outer):
            staged = outer / "new"
            staged.mkdir()
            yield staged
    finally:
        shutil.rmtree(outer, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process. Raises OSError if another process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def put_in_place(staged: Path, folder: Path) -> None:
    """Renames `staged` to `folder`. An artifact that was there is moved aside first, and put back if that fails."""
    old = staged.with_name("old")
    try:
        with suppress(FileNotFoundError):
            folder.rename(old)
        staged.rename(folder)
    except BaseException:  # a signal may come between the two
        with suppress(OSError):
            old.rename(folder)
        raise


def say(line: str) -> None:
    """One line of progress."""
    print(f"model.fetch: {one_line(line)}", flush=True)


def add_public_key(parser: argparse.ArgumentParser) -> None:
    """The option of those that take an artifact from somewhere else."""
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="PEM",
        default=Path(os.environ[PUBLIC_KEY_VARIABLE]) if os.environ.get(PUBLIC_KEY_VARIABLE) else None,
        help=f"public keys, one of which must have signed it (default: ${PUBLIC_KEY_VARIABLE})",
    )


def main() -> None:
    """Command line of `python -m model.fetch`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.fetch",
        description=__doc__,
        epilog="example: python -m model.fetch s3://models/my-model/1 /models/current",
    )
    parser.add_argument("url", metavar="URL", help="folder that holds manifest.json: https://, s3://, gs:// or a path")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the artifact will be")
    parser.add_argument("--digest", default="", help="sha256 that manifest.json must have")
    add_public_key(parser)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, help="tries for each object (default %(default)s)")
    parser.add_argument(
        "--timeout-seconds", type=float, default=TIMEOUT_SECONDS, help="for the whole (default %(default)s)"
    )
    args = parser.parse_args()
    if args.attempts < 1 or not re.fullmatch("(?i)((sha256:)?[0-9a-f]{64})?", args.digest):
        parser.error("--attempts must be at least 1, and --digest 64 hexadecimal digits")
    if not 0 < args.timeout_seconds <= MAX_TIMEOUT_SECONDS:
        parser.error(f"--timeout-seconds must be above 0, and at most {MAX_TIMEOUT_SECONDS}")
    # Libraries log addresses with their signatures, and what they warn of is for their authors.
    logging.disable(logging.CRITICAL)
    logging.captureWarnings(True)
    # So that a Pod that is deleted meanwhile leaves nothing behind: exceptions unwind, a signal would not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        fetch(args.url, args.folder, args.digest, args.attempts, args.timeout_seconds, args.public_key)
    except StartupError as error:
        print(f"model.fetch: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
