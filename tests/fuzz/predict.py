"""Any JSON and any text to /predict, /predict/batch and /infer, through the real task: answered, or refused without a
word of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.service import running
from tests.text_model import NAME

# The path, and the body.
Case = tuple[str, bytes]
EXAMPLES = 200
PATHS = ["/predict", "/predict/batch", f"/v2/models/{NAME}/infer"]
STATUSES = {200, 400, 422, 429, 503}
MARK = "zyzzyva"

characters = st.one_of(
    st.characters(),
    st.characters(categories=["Cs", "Cc", "Cf", "Mn", "Co", "Cn"]),
    st.sampled_from("\0\u202e\ufeff\ufffd\u0345İßﬁ가각𝕳👩\u200d👩\U0010ffff"),
)
plain = st.text(characters, max_size=12)
words = st.builds(lambda text, times: (text + MARK) * times, plain, st.sampled_from([1, 1, 1, 2, 30, 400]))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(words | st.sampled_from(["text", "texts"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def infer(texts: Any) -> dict[str, Any]:
    shape = [len(texts)] if isinstance(texts, list) else [1]
    return {"inputs": [{"name": "text", "shape": shape, "datatype": "BYTES", "data": texts}]}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    path = draw(st.sampled_from(PATHS))
    good = draw(st.integers(0, 2))
    if good == 0:
        content = draw(anything)
    else:
        texts = draw(st.lists(words | plain, max_size=6) if good == 1 else st.lists(anything, max_size=4) | anything)
        text = texts[0] if isinstance(texts, list) and texts else texts
        content = {"/predict": {"text": text}, "/predict/batch": {"texts": texts}}.get(path) or infer(texts)
    ascii_only = draw(st.booleans())
    body = bytearray(json.dumps(content, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
    for place, change in draw(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=2)), max_size=1)):
        body[place : place + 1] = change
    return path, bytes(body)


CASES = cases()


@contextmanager
def checking() -> Iterator[Callable[[Case], None]]:
    """The check of a case; raises what is wrong."""
    with running() as service:

        def check(case: Case) -> None:
            path, body = case
            client = service.loop.run_until_complete(service.served.ask(path, "POST", body))
            logged = " ".join(line for _, line in service.logged)
            service.require_calm()
            assert client.status in STATUSES, client.text
            assert MARK not in client.text + logged
            if client.status != 200:
                assert isinstance(client.body["error"], str)

        yield check
