"""Holds SBOMs to the schema of CycloneDX, strictly: `python docker/check_sbom.py FILE...`, as `make sbom` does."""

import sys
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def main() -> None:
    """Command line: a line for each file, exit code 1 if one of them is not valid."""
    wrong = 0
    for path in map(Path, sys.argv[1:]):
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text())
        wrong += error is not None
        print(f"{path}: {'valid CycloneDX 1.6' if error is None else error}")
    sys.exit(1 if wrong or not sys.argv[1:] else 0)


if __name__ == "__main__":
    main()
