"""Licences of what images hold: `python docker/licences.py LOCK...` lists each package of these lock files with its own
word on its licence, and ends with 1 if one of them is not among those that are allowed.

It reads the metadata of what is installed here; packages that are not are listed as such, and not judged.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

# They ask for no more than their text and a notice; MPL-2.0 for the source of its own files as well.
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0",
    "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# What older metadata says, in identifiers of SPDX.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==", re.MULTILINE)
NOT_INSTALLED, UNKNOWN = "not installed here", "unknown"


def packages(locks: Iterable[Path]) -> list[str]:
    """Names of all that these lock files pin."""
    return sorted({name for lock in locks for name in PINNED.findall(lock.read_text())})


def licence_of(package: str) -> str:
    """As an SPDX expression, if the package says one or something that means one."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
    if expression := found.get("License-Expression"):
        return str(expression)
    told = str(found.get("License") or "").strip()
    if judged(SPDX.get(told, told)):
        return SPDX.get(told, told)
    classifiers = [each.rpartition(" :: ")[2] for each in found.get_all("Classifier") or [] if "License ::" in each]
    return " OR ".join(SPDX.get(each, each) for each in classifiers) or told.partition("\n")[0][:60] or UNKNOWN


def judged(expression: str) -> bool:
    """Whether an expression can be met with licences that are allowed. In brackets, all of them must be."""
    if "(" in expression:
        return set(re.findall(r"[\w.+-]+", expression)) - {"AND", "OR"} <= ALLOWED
    return any(all(name in ALLOWED for name in part.split(" AND ")) for part in expression.split(" OR "))


def main() -> None:
    """Command line."""
    found = {name: licence_of(name) for name in packages(map(Path, sys.argv[1:]))}
    refused = [name for name, licence in found.items() if licence != NOT_INSTALLED and not judged(licence)]
    for name, licence in found.items():
        print(f"{name:32} {licence}{'  ← not allowed' if name in refused else ''}")
    absent = sum(licence == NOT_INSTALLED for licence in found.values())
    print(f"{len(found)} packages: {len(found) - absent} judged, {absent} {NOT_INSTALLED}, {len(refused)} not allowed")
    sys.exit(1 if refused or not found else 0)


if __name__ == "__main__":
    main()
