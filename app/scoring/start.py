"""From settings and options to a scorer: the model through the gate, the inputs found, the plan made or read."""

from msgspec import Struct

from app.errors import ConfigError
from app.runtime.loading import load_configured
from app.scoring.formats import SUFFIXES, open_format
from app.scoring.plan import Work, open_plan
from app.scoring.run import Count, Scorer
from app.scoring.storage import Input, Storage
from app.scoring.table import Table
from app.settings import Settings


class Options(Struct, frozen=True):
    """The command line's."""

    input: str
    output: str
    file_format: str = ""
    text_column: str = "text"
    id_column: str = ""
    shards: int = 0
    shard_rows: int = 0
    max_bad_rows: int = 100
    max_row_bytes: int = 1 << 20


def open_scorer(options: Options, settings: Settings, count: Count = lambda scored, bad: None) -> Scorer:
    """Raises StartupError: ConfigError for options that do not fit the model, the inputs or the plan there is."""
    source, output = Storage(options.input, "INPUT"), Storage(options.output, "OUTPUT")
    inputs = source.find()
    if not inputs:
        raise ConfigError(f"INPUT: {source}: no files found; those that begin with _ or . do not count")
    if any(each.path.startswith(f"{output.path.rstrip('/')}/") for each in inputs) or output.is_inside(source):
        raise ConfigError(f"OUTPUT: {output}: expected a place outside INPUT, which is {source}")
    file_format = options.file_format or _format_of(inputs)
    reader = open_format(file_format, options.max_row_bytes)
    model = load_configured(settings)
    table, manifest = Table(model, file_format, options.text_column, options.id_column), model.artifact.manifest
    work = Work(
        model=manifest.name,
        model_version=manifest.version,
        digest=model.artifact.digest,
        provider=model.provider,
        batch_rows=model.batch_rows,
        batch_tokens=model.batch_tokens,
        file_format=file_format,
        columns=table.columns,
        id_column=options.id_column,
        max_row_bytes=options.max_row_bytes,
        shards=options.shards,
        shard_rows=options.shard_rows,
        inputs=inputs,
    )
    return Scorer(model, table, open_plan(work, source, output, reader), source, output, options.max_bad_rows, count)


def _format_of(inputs: list[Input]) -> str:
    """By the ends of their names. Raises ConfigError unless it is one."""
    found = {each.path: SUFFIXES.get(each.path.rpartition(".")[2].lower(), "") for each in inputs}
    if "" in found.values():
        path = next(path for path, name in found.items() if not name)
        raise ConfigError(f"INPUT: {path}: expected a name that ends in .jsonl, .csv or .parquet, or --format")
    if len(kinds := set(found.values())) > 1:
        raise ConfigError(f"INPUT: expected files of one format, found {sorted(kinds)}")
    return kinds.pop()
