"""`python -m tests.fuzz [TARGET …] --seconds N`: new cases, led by what code of app they reach, until one fails.

The smallest that fails is kept in a file, and `--case FILE` tries it again. Exit 0: none failed; 1: one did.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import Phase, given
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz import NAMES, quietly, target

ROOT = Path(__file__).parent.parent.parent
# Beside Hypothesis's own, which git ignores.
KEPT = ROOT / ".hypothesis" / "fuzz"
MAX_MEMORY_MB, CASE_SECONDS, MAX_CHOICES_BYTES = 4096, 60, 8192


def recorded(name: str, check: Callable[[Any], None]) -> Any:
    """The check as a test of Hypothesis, which keeps the smallest case that failed."""
    path = KEPT / f"{name}.case"

    def each(case: Any) -> None:
        try:
            check(case)
        except Exception:
            text = repr(case)
            if not path.exists() or len(text) < len(path.read_text()):
                path.write_text(text)
            raise

    database = DirectoryBasedExampleDatabase(KEPT / "found")
    return quietly(database=database, phases=[Phase.reuse, Phase.shrink])(given(target(name).CASES)(each))


def explore(name: str, seconds: int) -> None:
    """Tries cases in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["app"]):
        target(name)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_MEMORY_MB}", f"-timeout={CASE_SECONDS}"]
    limits += [
        f"-max_len={MAX_CHOICES_BYTES}",
        f"-artifact_prefix={KEPT / name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    with target(name).checking() as check:
        run = recorded(name, check).hypothesis.fuzz_one_input
        atheris.Setup([sys.argv[0], *limits, str(KEPT / f"{name}-corpus")], run)
        atheris.Fuzz()


def in_turn(names: list[str], seconds: int) -> int:
    """Each target for its part of the time, in a process of its own. The exit code."""
    for name in names:
        (KEPT / f"{name}-corpus").mkdir(parents=True, exist_ok=True)
        case = KEPT / f"{name}.case"
        case.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(max(1, seconds // len(names)))]
        if subprocess.run([*command, "--step", "explore"], cwd=ROOT, check=False).returncode:
            subprocess.run([*command, "--step", "shrink"], cwd=ROOT, check=False, capture_output=True)
            again = f"try it again with: {sys.executable} -m tests.fuzz {name} --case {case}"
            # A process that was killed leaves what the fuzzer itself has, if anything.
            print(
                f"{name}: failed: {case}\n{again}" if case.exists() else f"{name}: failed, see above: {KEPT / name}-*"
            )
            return 1
    print(f"no case failed in {seconds} s: {', '.join(names)}")
    return 0


def main() -> None:
    """Command line of `python -m tests.fuzz`."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for all of them together (default %(default)s)")
    parser.add_argument("--case", type=Path, help="a case that was kept, to try again")
    parser.add_argument("--step", choices=("explore", "shrink"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.target or list(NAMES)
    if not set(names) <= set(NAMES) or (args.case and len(names) > 1):
        parser.error(f"TARGET: expected some of {', '.join(NAMES)}, and one for --case")
    if args.case:
        with target(names[0]).checking() as check:
            check(ast.literal_eval(args.case.read_text()))
    elif args.step == "explore":
        explore(names[0], args.seconds)
    elif args.step == "shrink":
        with target(names[0]).checking() as check:
            recorded(names[0], check)()
    else:
        sys.exit(in_turn(names, args.seconds))


if __name__ == "__main__":
    main()
