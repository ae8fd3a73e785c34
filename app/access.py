"""Who may ask: API keys from a file, such as a mounted Secret, read anew when it changes. Knows no HTTP.

One key a line, `NAME:KEY`; names go to logs and metrics, keys nowhere.
"""

import hmac
import re
import secrets
import time
from pathlib import Path

from app.errors import ConfigError, Unauthorized
from app.telemetry import logging

# What a bearer token may be (RFC 6750), long enough that nobody guesses it.
LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([A-Za-z0-9._~+/-]{16,512}=*)")
MAX_KEYS = 1000
# Kubelet itself takes up to a minute to bring a changed Secret to the Pod.
LOOK_SECONDS = 1.0


class ApiKeys:
    """Of one file. names: all that were ever in it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be read or has a line that is no key; it quotes none."""
        self._path = path
        # Keys are looked up by a keyed hash: how long that takes says nothing of how much of a key was right.
        self._secret = secrets.token_bytes(32)
        self._names: dict[bytes, str] = {}
        self.names: set[str] = set()
        self._seen: tuple[int, int] | None = None
        self._look_again = 0.0
        self._read()

    def name_of(self, authorization: str | None) -> str:
        """Whose key it is, from what stands in `Authorization`. Raises Unauthorized."""
        self._follow()
        scheme, _, key = (authorization or "").partition(" ")
        name = self._names.get(self._digest(key.strip())) if scheme.lower() == "bearer" else None
        if name is None:
            raise Unauthorized("expected `Authorization: Bearer` and a key that is known")
        return name

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "replace"), "sha256")

    def _follow(self) -> None:
        """Reads the file again if it has changed; what is wrong with it then leaves the keys as they were."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + LOOK_SECONDS
        try:
            if self._state() != self._seen:
                self._read()
                logging.logger().info("API keys read", keys=len(self._names))
        except (ConfigError, OSError) as error:
            reason = str(error) if isinstance(error, ConfigError) else type(error).__name__
            logging.logger().error("API keys not read, the old ones hold", reason=reason)

    def _state(self) -> tuple[int, int]:
        found = self._path.stat()  # of what a link leads to: kubelet changes the link
        return found.st_mtime_ns, found.st_ino

    def _read(self) -> None:
        try:
            self._seen = self._state()
            lines = self._path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"APP_API_KEYS_FILE={self._path}: cannot be read: {reason}") from None
        names = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not (match := LINE.fullmatch(line.strip())):
                expected = "expected NAME:KEY, a key of 16 to 512 letters, digits and ._~+/-"
                raise ConfigError(f"APP_API_KEYS_FILE={self._path}: line {number}: {expected}")
            names[self._digest(match[2])] = match[1]
        if not 0 < len(names) <= MAX_KEYS:
            raise ConfigError(f"APP_API_KEYS_FILE={self._path}: expected 1 to {MAX_KEYS} keys, found {len(names)}")
        self._names = names
        self.names |= set(names.values())
