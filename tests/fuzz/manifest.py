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

# The artifact that it belongs to, where it is changed, and to what: parsed values as JSON, then bytes.
Case = tuple[str, list[tuple[list[int], bytes]], list[tuple[int, bytes]]]
EXAMPLES = 100

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**63, 10**30, 1e308, -1.0, 0.5, float("nan"), float("inf")]),
    st.sampled_from(
        ["", ".", "..", "/", "/dev/zero", "/proc/self/mem", "../x", "manifest.json", "model.onnx", "a" * 5000]
    ),
    st.sampled_from(["FP16", "BYTES", "INT64", "logits", "text-classification", "tensors", "\0", "\x1b[2J", "\udcff"]),
    st.text(max_size=6),
)
changes = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


CASES = st.tuples(
    st.sampled_from(["text", "tensors"]),
    st.lists(st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), changes.map(as_json)), max_size=2),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), max_size=1),
)


def changed(node: Any, path: list[int], value: Any) -> Any:
    """`node` with `value` at the place that `path` leads to: at each step one of what is there, by its number."""
    places = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    if not places or not path:
        return value
    place = places[path[0] % len(places)]
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
                manifest = changed(manifest, path, json.loads(value))
            raw = bytearray(json.dumps(manifest).encode())
            for place, change in damages:
                raw[place : place + 1] = change
            (good[kind] / MANIFEST).write_bytes(raw)
            assert refusal(good[kind]).isprintable(), refusal(good[kind])

        yield check
