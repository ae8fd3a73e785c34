"""Known vulnerabilities in what is locked: `python docker/audit.py LOCK...`, in the environment of `make audit`.

Exit code 0: a database knows every package, and nothing bad of it; 1: vulnerabilities; 2: not all were looked up:
pip-audit alone would say of a package that its database does not have what it says of a sound one.
"""

# ruff: noqa: S603 - it runs pip-audit
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

COMMAND = [
    sys.executable,
    "-m",
    "pip_audit",
    "--disable-pip",
    "--require-hashes",
    "--progress-spinner=off",
    "--format=json",
]


def report(lock: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package; nothing if no database answered."""
    done = subprocess.run([*COMMAND, "--requirement", lock], capture_output=True, text=True, check=False)
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError):
        print(f"{lock}: {(done.stderr.strip().splitlines() or ['pip-audit says nothing'])[-1]}", file=sys.stderr)
        return []


def verdict(packages: Iterable[dict[str, Any]], complete: bool) -> tuple[list[str], int]:
    """Lines to print and the exit code. complete: whether there is a report of every lock file."""
    by_name = {(each["name"], each.get("version", "")): each for each in packages}
    known = [each for each in by_name.values() if "skip_reason" not in each]
    lines = [
        f"{each['name']} {each['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for each in known
        for found in each["vulns"]
    ]
    skipped = sorted(name for (name, _), each in by_name.items() if "skip_reason" in each)
    if not known:
        return ["no database of vulnerabilities could be reached: nothing was checked"], 2
    if skipped or not complete:
        lines.append(f"not checked, because the database does not have them or did not answer: {', '.join(skipped)}")
    lines.append(
        f"{len(known)} packages checked, {len([each for each in known if each['vulns']])} with vulnerabilities"
    )
    return lines, 1 if any(each["vulns"] for each in known) else 2 if skipped or not complete else 0


def main() -> None:
    """Command line."""
    reports = [report(lock) for lock in sys.argv[1:]]
    lines, code = verdict((each for found in reports for each in found), complete=bool(reports) and all(reports))
    print(*lines, sep="\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
