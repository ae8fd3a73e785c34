"""`python -m app.scoring INPUT OUTPUT`: scores a data set, or one index of an Indexed Job's part of it."""

import argparse
import os
import sys
from types import FrameType

from app.signals import on_stop


def stop(number: int, _: FrameType | None) -> None:
    """Ends at once, as a signal that nobody handles does: what is not committed does not count. Never 0, which would
    tell a Job that the index is done."""
    os._exit(128 + number)


on_stop(stop)

from app.errors import ConfigError, StartupError  # noqa: E402
from app.lifecycle import exit_process, or_exit  # noqa: E402
from app.settings import Settings, read_settings, unknown_variables  # noqa: E402
from app.telemetry import logging  # noqa: E402

INDEX = "JOB_COMPLETION_INDEX"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def natural(text: str) -> int:
    """A whole number of at least 0."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    """The command line. Model and provider are settings, as the server's."""
    made = argparse.ArgumentParser(
        prog="python -m app.scoring",
        description="Scores every row of INPUT with the model in APP_MODEL_DIR. Killed or run again, it goes on where "
        "it was, and ends with the same bytes. Settings are the server's: APP_MODEL_DIR, APP_PROVIDER, APP_RUNNERS, …",
        epilog="exit codes: 0 done, 2 options, 3 artifact, 4 provider, 5 not read or not stored, 6 too many bad rows, "
        "143 SIGTERM. example: python -m app.scoring reviews.jsonl scored",
    )
    made.add_argument(
        "input", metavar="INPUT", help="a file, a folder, a pattern or how names begin; s3://, gs:// or a path"
    )
    made.add_argument("output", metavar="OUTPUT", help="a folder that is empty, or one that this run began")
    made.add_argument("--format", choices=("jsonl", "csv", "parquet"), default="", help="default: by the files' names")
    made.add_argument("--text-column", default="text", help="tensor models take one column for each input, by its name")
    made.add_argument("--id-column", default="", help="carried along as `id`; default: the number of the row")
    sizes = made.add_mutually_exclusive_group()
    sizes.add_argument("--shards", type=positive, default=0, help="how many")
    sizes.add_argument("--shard-rows", type=positive, default=0, help="rows of each (default: 10000)")
    made.add_argument(
        "--index", type=natural, help=f"of an Indexed Job (default: {INDEX}); without, all shards are done here"
    )
    made.add_argument(
        "--completions", type=positive, help="of that Job: an index takes every so many-th shard (default: --shards)"
    )
    made.add_argument(
        "--max-bad-rows", type=natural, default=100, help="of a shard; beyond: exit code 6 (default: 100)"
    )
    made.add_argument("--max-row-bytes", type=positive, default=1 << 20, help="a longer row is bad (default: 1 MiB)")
    made.add_argument("--plan-only", action="store_true", help="write the plan, score nothing")
    made.add_argument("--metrics-port", type=natural, default=0, help="answer /metrics there (default: nowhere)")
    made.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster at RAY_ADDRESS")
    made.add_argument("--actors", type=positive, default=1, help="of Ray, each with a model (default: 1)")
    return made


def index_of(found: argparse.Namespace) -> int | None:
    """Of the Indexed Job. Raises ConfigError if which shards are its cannot be told."""
    index = found.index
    if index is None and (text := os.environ.get(INDEX)):
        if not text.isdigit():
            raise ConfigError(f"{INDEX}={text!r}: expected a whole number")
        index = int(text)
    if index is None:
        return None
    if not found.shards and not found.completions:
        raise ConfigError("an index needs --shards, as many as the Job has completions, or --completions")
    if index >= (found.completions or found.shards):
        raise ConfigError(f"index {index}: expected one below {found.completions or found.shards}")
    return int(index)


def score(found: argparse.Namespace, settings: Settings) -> None:
    """Raises StartupError."""
    try:
        from app.scoring.commit import finish, shards_done
        from app.scoring.progress import Progress
        from app.scoring.start import Options, open_scorer
    except ModuleNotFoundError as error:
        raise ConfigError(f"app.scoring takes {error.name}; install the `scoring` extra") from None
    index = index_of(found)
    options = Options(
        found.input, found.output, found.format, found.text_column, found.id_column, found.shards, found.shard_rows,
        found.max_bad_rows, found.max_row_bytes,
    )  # fmt: skip
    with Progress(found.metrics_port) as progress:
        scorer = open_scorer(options, settings, progress.count)
        count = len(scorer.plan.shards)
        log = logging.logger().bind(shards=count, rows=scorer.plan.rows)
        if found.plan_only:
            log.info("planned")
            return
        mine = range(count) if index is None else range(index, count, found.completions or found.shards)
        done = shards_done(scorer.output, scorer.plan)
        todo = [shard for shard in mine if shard not in done]
        log.info("scoring", index=index, to_do=len(todo))
        progress.expect(sum(scorer.plan.shards[shard].rows for shard in todo))
        if found.engine == "ray":
            from app.scoring.ray_engine import score_on_ray

            markers = score_on_ray(options, settings, todo, found.actors)
        else:
            markers = scorer.score(todo)
        for marker in markers:
            progress.shard(marker)
        manifest = finish(scorer.output, scorer.plan)
    if manifest is not None:
        log.info("complete", scored=manifest.rows, bad_rows=manifest.bad_rows)


def main() -> None:
    found = parser().parse_args()
    settings = or_exit(read_settings)
    logging.configure(settings.log_level, settings.log_format)
    for name in unknown_variables():
        logging.logger().warning("unknown setting", variable=name)
    try:
        score(found, settings)
    except StartupError as error:
        exit_process(error)
    logging.flush()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
