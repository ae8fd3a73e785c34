"""Whether a release may go on: rollout, endpoints, restarts, latency, errors, refusals and predictions, the candidate's
beside the stable Pods'. It reads, and changes nothing."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from diagnosis.cluster import KubectlError, read, ready
from diagnosis.rules import findings
from promotion import prometheus, scrape
from promotion.checks import checks, verdict
from promotion.evidence import Bounds, Check, Evidence
from promotion.tracks import tracks
from promotion.traffic import EvidenceError

EXIT_CODES = {"promote": 0, "wait": 10, "roll back": 20}


def main() -> int:
    given = parse()
    options = [f"--{name}={value}" for name in ("kubeconfig", "context") if (value := getattr(given, name)) is not None]
    bounds = Bounds(given.max_error_ratio, given.max_refused_ratio, given.p95_ms / 1000, given.max_stability_index)
    try:
        evidence, seconds = collect(given, options)
    except (KubectlError, EvidenceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = checks(evidence, bounds)
    word, reason = verdict(found)
    if given.json:
        answer = {
            "namespace": given.namespace,
            "judged": evidence.judged.name,
            "verdict": word,
            "reason": reason,
            "seconds": seconds,
            "checks": [vars(each) for each in found],
        }
        print(json.dumps(answer, indent=2))
    else:
        show(found, [each.name for each in evidence.tracks])
        print(f"\n{evidence.judged.name}: {word}: {reason}")
    return EXIT_CODES[word]


def parse() -> argparse.Namespace:
    bounds = Bounds()
    parser = argparse.ArgumentParser(
        description="Whether a release may go on: the candidate's Pods if there are any, else the stable ones.",
        epilog="Exit code: 0 promote, 10 wait, 20 roll back, 2 it cannot say.",
    )
    parser.add_argument("-n", "--namespace", required=True)
    parser.add_argument("--app", default="sentiment-inference", help="label app.kubernetes.io/name (%(default)s)")
    parser.add_argument("--kubeconfig", help="passed on to kubectl")
    parser.add_argument("--context", help="passed on to kubectl")
    parser.add_argument(
        "--prometheus", metavar="URL", help="where its HTTP API is; without, each Pod's /metrics is read"
    )
    parser.add_argument(
        "--seconds",
        type=int,
        help="what is judged: the last 600 with Prometheus, the next 60 without; 0 without: all since the Pods started",
    )
    parser.add_argument("--max-error-ratio", type=ratio, default=bounds.error_ratio, help="500 and 504 (%(default)s)")
    parser.add_argument("--max-refused-ratio", type=ratio, default=bounds.refused_ratio, help="(%(default)s)")
    parser.add_argument("--p95-ms", type=float, default=1000 * bounds.p95_seconds, help="(%(default)s)")
    parser.add_argument(
        "--max-stability-index",
        type=float,
        default=bounds.stability_index,
        help="of predictions against the model's reference (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    given = parser.parse_args()
    if given.seconds is None:
        given.seconds = 600 if given.prometheus else 60
    if given.seconds < (1 if given.prometheus else 0):
        parser.error(f"--seconds {given.seconds}: too few")
    if given.prometheus and not given.prometheus.startswith(("http://", "https://")):
        parser.error(f"--prometheus {given.prometheus}: expected http:// or https://")
    return given


def ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and less than 1")
    return value


def collect(given: argparse.Namespace, options: list[str]) -> tuple[Evidence, int]:
    cluster = read(given.namespace, options)
    known = tracks(cluster, given.app)
    if given.prometheus:
        names = [[pod["metadata"]["name"] for pod in each.pods] for each in known]
        traffic = [prometheus.traffic(given.prometheus, given.namespace, each, given.seconds) for each in names]
    else:
        pods = [[pod for pod in each.pods if ready(pod)] for each in known]
        traffic = scrape.traffic(options, given.namespace, pods, given.seconds)
        if given.seconds:
            # A Pod that restarted meanwhile is to be seen.
            cluster = read(given.namespace, options)
    counted = dict(zip((each.name for each in known), traffic, strict=True))
    now = [each for each in tracks(cluster, given.app) if each.name in counted]
    return Evidence(cluster, now, counted, findings(cluster)[0]), given.seconds


def show(found: list[Check], names: list[str]) -> None:
    rows = [["", "", *names, "bound"]]
    for each in found:
        values = ["" if (value := each.values.get(name)) is None else str(value) for name in names]
        rows.append([each.state, each.name, *values, each.bound])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
