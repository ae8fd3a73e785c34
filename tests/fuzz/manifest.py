"""manifest.json, damaged, to the whole gate: it passes, or the process ends with a line that says why."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from app.artifact.manifest import MANIFEST
from app.errors import ArtifactError
from app.runtime.loading import load_model
from tests.unit.runtime.test_loading import good_artifacts

# The artifact that it belongs to; where a value is changed, to what JSON or to which other of its kind; then bytes.
Case = tuple[str, list[tuple[list[int], bytes | int]], list[tuple[int, bytes]]]
EXAMPLES = 100

STRINGS = [
    "",
    ".",
    "/dev/zero",
    "../x",
    "manifest.json",
    "a" * 5000,
    "FP16",
    "BYTES",
    "INT64",
    "logits",
    "\0",
    "\x1b[2J",
]
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**63, 1e308, -1.0, 0.5, float("nan"), float("inf"), "/proc/self/mem", "tensors", "\udcff"]),
    st.sampled_from(STRINGS),
    st.text(max_size=6),
)
changes = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
places = st.lists(st.integers(0, 30), min_size=1, max_size=4)
edits = st.tuples(places, st.integers(0, 20) | changes.map(lambda value: json.dumps(value).encode()))
damages = st.tuples(st.integers(0, 2000), st.binary(max_size=3))
CASES = st.tuples(
    st.sampled_from(["text", "tensors"]),
    st.lists(edits, max_size=2),
    st.one_of(st.just([]), st.just([]), st.lists(damages, max_size=1)),
)


def another(value: Any, number: int) -> Any:
    """Another value of the same kind."""
    options: list[Any] = [None]
    match value:
        case bool():
            options = [not value]
        case int():
            options = [0, -1, 1, 2, 2**31, 10**30]
        case float():
            options = [0.0, -1.0, 1e-300, 1e308]
        case str():
            options = STRINGS
        case list():
            options = [[], value[:-1], value * 2, value[::-1]]
        case dict():
            options = [{}, dict(list(value.items())[:-1]), value | {"x": 1}]
    return options[number % len(options)]


def changed(node: Any, path: list[int], value: bytes | int) -> Any:
    """`node`, changed at the place that `path` leads to: at each step one of what is there, by its number."""
    inside = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    if not inside or not path:
        return another(node, value) if isinstance(value, int) else json.loads(value)
    place = inside[path[0] % len(inside)]
    node[place] = changed(node[place], path[1:], value)
    return node


def refusal(folder: Path) -> str:
    """What the gate says of it; "" if it passes."""
    try:
        load_model(folder)
    except ArtifactError as error:
        return str(error)
    return ""


@contextmanager
def checking() -> Iterator[Callable[[Case], None]]:
    """The check of a case; raises what is wrong."""
    with tempfile.TemporaryDirectory() as root:
        good = good_artifacts(Path(root))
        text = {kind: (folder / MANIFEST).read_text() for kind, folder in good.items()}

        def check(case: Case) -> None:
            kind, edits, damages = case
            manifest = json.loads(text[kind])
            manifest.pop("checksum", None)
            for path, value in edits:
                manifest = changed(manifest, path, value)
            raw = bytearray(json.dumps(manifest).encode())
            for place, change in damages:
                raw[place : place + 1] = change
            (good[kind] / MANIFEST).write_bytes(raw)
            assert refusal(good[kind]).isprintable(), refusal(good[kind])

        yield check
