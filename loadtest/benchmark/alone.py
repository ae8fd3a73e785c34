"""A request that is alone, by length: `python -m loadtest.benchmark.alone`. This server with one thread for a run and
with one for each CPU, beside the plain script, which lets ONNX Runtime use them all; and what each carries in a crowd.
"""

import argparse
import os
import random
import statistics
from contextlib import ExitStack
from pathlib import Path

from loadtest.benchmark.load import closed
from loadtest.benchmark.server import SERVED, plain, service, serving, text_artifact
from loadtest.texts import sentences, text_of_words

WORDS = (4, 12, 24, 48, 96, 160)
ROUNDS = 5


def main() -> None:
    """Prints a table: median p50 in milliseconds of ROUNDS turns, in which all servers have the same load in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark.alone",
        description=__doc__,
        epilog="example: python -m loadtest.benchmark.alone --artifact my-model --threads 4",
    )
    parser.add_argument("--artifact", type=text_artifact, default=SERVED, help="a text model's folder")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="APP_RUNNER_THREADS of the wide server")
    args = parser.parse_args()
    artifact, rng = Path(args.artifact), random.Random(0)
    commands = {
        "1 thread": service(artifact),
        f"{args.threads} threads": service(artifact, runner_threads=args.threads),
        "plain FastAPI": plain(artifact, 1),
    }
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(command)) for name, command in commands.items()}

        def medians(texts: list[str], connections: int, figure: str) -> list[float]:
            rounds = [
                [closed(s, texts, connections, args.seconds)[figure] for s in servers.values()] for _ in range(ROUNDS)
            ]
            return [statistics.median(column) for column in zip(*rounds, strict=True)]

        print("".join(f"{title:>16}" for title in ("words", *servers)))
        for words in WORDS:
            row = medians([text_of_words(words, rng) for _ in range(64)], 1, "p50_ms")
            print(f"{words:>16}" + "".join(f"{value:>13.2f} ms" for value in row), flush=True)
        row = medians(sentences(1024), 64, "requests_per_second")
        print(f"{'64 connections':>16}" + "".join(f"{value:>14.0f}/s" for value in row))


if __name__ == "__main__":
    main()
