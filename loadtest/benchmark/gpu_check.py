"""What has to be seen of this server on a GPU, in one command: `python -m loadtest.benchmark.gpu_check`.

The gate on CUDA, where its nodes run, agreement with the CPU, GPU memory, the bare session and the server beside it. A
table, and JSON in a file. Exit code 0: what was measured holds · 1: something is wrong · 2: usage · 4: CUDA is not
available. Installs nothing and needs no network; what cannot be measured says why, and the rest goes on.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from app.settings import cpu_quota
from loadtest.benchmark.gpu_sections import Work
from loadtest.benchmark.gpu_use import missing
from loadtest.benchmark.load import allow_connections
from loadtest.benchmark.server import ROOT, SERVED, any_artifact

# Share of the time. What one leaves is for the next, so that the longest is last.
SHARES = {"gate": 2, "provider": 2, "agreement": 2, "gpu": 1, "bound": 2, "session": 4, "server": 8}
CUDA_ARTIFACT = ROOT / "artifacts/sentiment-cuda"
# For what is out of time, to end its servers.
GRACE_SECONDS = 15
UNAVAILABLE = 4
MIN_SECONDS = 0.1
ENDS = ("wrong", "unmeasured")


def measure(work: Work) -> dict[str, Any]:
    """A section's figures, and if it ended before its end why: `wrong`, `unmeasured`, or CUDA is `unavailable`."""
    command = [sys.executable, "-m", "loadtest.benchmark.gpu_sections", msgspec.json.encode(work).decode()]
    started, late = time.monotonic(), False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        try:
            process.wait(work.seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        # Libraries write to standard output as well.
        lines = [line for line in out.read().splitlines() if line.startswith('{"')]
        errors = err.read().strip().splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line)
    code = process.returncode
    if late:
        found = {"unmeasured": f"stopped after {work.seconds:.0f} s, its share of the time"} | found
    elif code:
        found["wrong"] = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if "wrong" in found and errors and errors[-1] not in found["wrong"]:
        found["wrong"] += f": {errors[-1]}"
    return found | {"took_seconds": round(time.monotonic() - started, 2)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sections within the time there is, printed as they come. `unavailable` ends it: what CUDA lacks here."""
    end = time.monotonic() + args.seconds - GRACE_SECONDS
    sections: dict[str, dict[str, Any]] = {}
    report = {"provider": args.provider, "artifact": str(args.artifact), "cpu_artifact": str(args.cpu_artifact)}
    work, left = Work(**report, load_seconds=args.load_seconds), {name: SHARES[name] for name in {*args.only, "gate"}}
    for name in [name for name in SHARES if name in left]:
        seconds = max(MIN_SECONDS, (end - time.monotonic()) * left[name] / sum(left.values()))
        del left[name]
        best = sections.get("session", {})
        batch, rate = best.get("best batch", 0), best.get("best rows/s", 0.0)
        found = measure(replace(work, section=name, seconds=seconds, batch=batch, rows_per_second=rate))
        # Depending on what is missing, ONNX Runtime goes on without CUDA or fails.
        reason = found.get("unavailable", found.get("wrong"))
        if name == "gate" and args.provider == "cuda" and reason:
            lacks = ", ".join(missing())
            if lacks or "unavailable" in found:
                return report | {"unavailable": f"{reason}; missing: {lacks or 'nothing that can be seen'}"}
        sections[name] = found
        print("\n".join(shown(name, found)), flush=True)
    return report | {"cpus": cpu_quota(), "sections": sections}


def shown(name: str, found: dict[str, Any]) -> list[str]:
    """A section as people read it: figures with columns have these over them, where they are not those of the last."""
    lines, columns = [f"{name}  ({found['took_seconds']:.1f} s)"], None
    for label, value in found.items():
        if label in ENDS or label == "took_seconds":
            continue
        if isinstance(value, dict):
            widths = [max(14, len(column) + 2) for column in value]
            if columns != list(value):
                columns = list(value)
                lines.append(f"  {'':<32}" + "".join(map(str.rjust, columns, widths)))
            lines.append(f"  {label:<32}" + "".join(map(str.rjust, map(number, value.values()), widths)))
        else:
            each = value if isinstance(value, list) else [value]
            lines.append(f"  {label:<44}  {', '.join(map(number, each))}")
    return lines + [f"  {end.upper()}: {found[end]}" for end in ENDS if end in found]


def number(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark.gpu_check",
        description=" ".join((__doc__ or "").split()),
        epilog="example: python -m loadtest.benchmark.gpu_check --artifact artifacts/sentiment-cuda --seconds 300",
    )
    parser.add_argument(
        "--artifact", type=any_artifact, help="folder; by default artifacts/sentiment-cuda, else the one that is served"
    )
    parser.add_argument("--cpu-artifact", type=any_artifact, default=SERVED, help="the same model for CPUs")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="cpu: the command without a GPU")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything")
    parser.add_argument("--load-seconds", type=float, default=8.0, help="of each load, at most")
    parser.add_argument(
        "--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="SECTION", help=", ".join(SHARES)
    )
    parser.add_argument("--out", type=Path, default=Path("bench/gpu-check.json"), help="the JSON file")
    args = parser.parse_args()
    note = ""
    if args.artifact is None:
        args.artifact = CUDA_ARTIFACT if args.provider == "cuda" and CUDA_ARTIFACT.is_dir() else Path(SERVED)
        if args.provider == "cuda" and args.artifact != CUDA_ARTIFACT:
            note = f"{CUDA_ARTIFACT.name} is not in artifacts/ (make artifact-cuda), so this is {SERVED} as it is"
    args.artifact, args.cpu_artifact = args.artifact.resolve(), Path(args.cpu_artifact).resolve()
    allow_connections()
    report = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    if "unavailable" in report:
        print(f"gpu_check: {report['unavailable']}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    wrong = [name for name, found in report["sections"].items() if "wrong" in found]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "nothing that was measured is wrong"
    print("\n".join(filter(None, [note, verdict])))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
