"""What every training command does around the loop: finds what is done, fits the rest, stores the result whole with its
run.json, and says by its exit code whether to run it again.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import BertForSequenceClassification

from app.errors import ConfigError, StartupError
from model.training.checkpoint import Checkpoints
from model.training.corpus import FILES
from model.training.distributed import Processes
from model.training.fit import INCOMPLETE_EXIT_CODE, Fit
from model.training.recipe import Recipe
from model.training.record import RUN_FILE, Run, write_record
from model.training.storage import Store

CHECKPOINT_MINUTES = 10.0
# The model to fit, another of its kind for its average, and their tokenizer.
Built = tuple[BertForSequenceClassification, BertForSequenceClassification, Tokenizer]


def carry_out(
    run: Run,
    build: Callable[[], Built],
    *,
    data: Path,
    out: str,
    recipe: Recipe,
    processes: Processes,
    checkpoints: Path | None,
    checkpoint_minutes: float,
    change: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Fits what `build` makes and stores a Hugging Face-style checkpoint at `out`, unless it is there already.

    change: what is done to that folder before it is stored. checkpoints: where an unfinished run leaves what it goes on
    from, OUT.checkpoints if not named. Raises ConfigError, FetchError, and SystemExit as Fit does.
    """
    store = Store(out)
    if checkpoints is None:
        if not store.folder:
            raise ConfigError(f"{store}: name a folder on a disk, from which an interrupted run goes on: --checkpoints")
        checkpoints = store.folder.with_name(f"{store.folder.name}.checkpoints")
    if (found := processes.from_main(store.finished)) is not None:
        if found.get("run") != run.fingerprint:
            raise ConfigError(f"{store}: has the result of another run, {found.get('run')}; name another --out")
        if processes.main:
            print(f"{store}: done already, run {run.fingerprint}", flush=True)
        return
    model, shadow, tokenizer = build()
    kept = Checkpoints(checkpoints, run.fingerprint)
    best, tracker = Fit(model, shadow, tokenizer, data, recipe, run, processes, kept, checkpoint_minutes).finish()
    if processes.main:
        assert best.weights is not None
        shadow.load_state_dict(best.weights)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "result")
            folder.mkdir()
            shadow.save_pretrained(folder)
            tokenizer.save(str(folder / "tokenizer.json"))
            change(folder)
            metrics = {"epoch": best.epoch, "accuracy": best.accuracy}
            write_record(folder, run.record(metrics, processes.device.type))
            store.put(folder)
            tracker.end(finished=True, record=folder / RUN_FILE)
        kept.clear()
        print(f"{store}: done, run {run.fingerprint}", flush=True)
    processes.wait()


@contextmanager
def corpus(address: str) -> Iterator[Path]:
    """The folder with the corpus; for the time of the run, if it comes from object storage."""
    with tempfile.TemporaryDirectory() as folder:
        yield Store(address).get(FILES, Path(folder))


def add_job(parser: argparse.ArgumentParser) -> None:
    """The options of every command that fits."""
    parser.add_argument("--data", required=True, metavar="URL|DIR", help="folder with the rated TSV files")
    parser.add_argument("--out", required=True, metavar="URL|DIR", help="folder to create: s3://, gs:// or a path")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="where a run goes on from (default OUT.checkpoints)",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=CHECKPOINT_MINUTES,
        metavar="N",
        help="the most that a killed run loses (default %(default)s)",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `add_job`, as `carry_out` takes them."""
    return {name: getattr(args, name) for name in ("out", "checkpoints", "checkpoint_minutes")}


@contextmanager
def exit_codes(name: str) -> Iterator[None]:
    """Errors as one line and their exit code; SIGTERM, where there is nothing to save, as INCOMPLETE_EXIT_CODE."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INCOMPLETE_EXIT_CODE))
    try:
        yield
    except StartupError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
