"""The page's files and the state that it shows: what is sent, what it may load, and what is never in it."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from app.http.page import files
from app.http.page.state import MOST_LABELS
from app.http.routes import DOCS, PAGE, rows_of
from app.runtime.session import Model
from app.settings import Settings
from tests.text_model import LABELS, MAX_TOKENS, NAME, VERSION
from tests.unit.http.asgi import PREDICT, Served, held, until

ROWS = [*PAGE, *DOCS]
FILES = [row.path for row in ROWS if row.path != "/state"]
OURS = sorted(path.name for path in files.STATIC.iterdir())


@pytest.mark.parametrize("path", FILES)
async def test_a_file_is_served_before_there_is_a_model_and_may_load_from_here_alone(path: str) -> None:
    async with Served() as served:
        answer = await served.ask(path)
        assert answer.status == 200
        assert answer.text
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "'self' data:"
        assert {policy.pop(kind) for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert policy == dict.fromkeys(("default-src", "form-action", "base-uri", "frame-ancestors"), "'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
        assert answer.headers["content-type"].startswith(kinds.get(Path(path).suffix, "text/html"))


async def test_a_file_that_the_client_has_is_not_sent_again() -> None:
    async with Served() as served:
        tag = (await served.ask("/page/page.js")).headers["etag"]
        again = await served.ask("/page/page.js", if_none_match=tag)
        assert (again.status, again.text) == (304, "")
        assert (await served.ask("/page/page.js", if_none_match='"other"')).status == 200


def test_every_file_of_the_folder_is_served() -> None:
    assert sorted({*files.PAGE, *files.DOCS, "index.html", "docs.html"}) == OURS


def test_every_file_that_a_file_names_is_served() -> None:
    named = set()
    for path in files.STATIC.iterdir():
        text = path.read_text()
        named |= {f"/{name}" for name in re.findall(r'<(?:link|script)[^>]*(?:href|src)="([^"]+)"', text)}
        named |= {f"/page/{name}" for name in re.findall(r"from '\./([^']+)'", text)}
    assert named <= set(FILES)
    assert {f"/page/{name}" for name in files.PAGE} <= named


@pytest.mark.parametrize("name", OURS)
def test_no_file_has_an_absolute_address_or_a_script_or_style_of_its_own(name: str) -> None:
    text = (files.STATIC / name).read_text()
    assert set(re.findall(r"\w+://[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(href|src|from|fetch\()\s*=?\s*['"]/""", text)
    assert not re.search(r"\sstyle=|\son\w+=|innerHTML|insertAdjacentHTML|localStorage|eval\(", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style", text)


@pytest.mark.parametrize("row", PAGE, ids=lambda row: row.path)
async def test_without_the_page_its_addresses_are_not_found(reviews: Model, row) -> None:
    async with Served(reviews, page=False) as served:
        assert (await served.ask(row.path)).status == 404
        assert (await served.ask("/docs")).status == 200


def test_a_gateway_has_documentation_and_no_page() -> None:
    rows = rows_of(Settings(role="gateway"))
    assert set(DOCS) <= set(rows)
    assert not set(PAGE) & set(rows)


async def test_neither_page_nor_state_is_in_the_document(reviews: Model) -> None:
    async with Served(reviews) as served:
        paths = (await served.ask("/openapi.json")).body["paths"]
        assert not {row.path for row in ROWS} & set(paths)


async def test_the_state_before_there_is_a_model_says_the_stage() -> None:
    async with Served() as served:
        answer = await served.ask("/state")
        assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
        assert (answer.body["stage"], answer.body["model"]) == ("verifying", None)


async def test_the_state_has_the_model_and_its_limits(reviews: Model) -> None:
    async with Served(reviews) as served:
        state = (await served.ask("/state")).body
        assert state["stage"] == "ready"
        assert state["model"] == {
            "name": NAME,
            "version": VERSION,
            "digest": reviews.artifact.digest,
            "task": "text-classification",
            "precision": reviews.artifact.manifest.precision,
            "provider": "cpu",
            "labels": LABELS,
            "max_tokens": MAX_TOKENS,
            "runners": reviews.runners,
            "max_batch_rows": reviews.batch_rows,
            "max_queue_rows": 16,
        }
        assert len(LABELS) <= MOST_LABELS


async def test_totals_are_those_of_the_metrics(reviews: Model) -> None:
    async with Served(reviews) as served:
        texts = ["short", "a much longer text of very many words"]
        await served.ask("/predict/batch", "POST", json.dumps({"texts": texts}).encode())
        await served.ask("/predict", "POST", b"{}")
        totals = (await served.ask("/state")).body["totals"]
        assert totals["requests"] == {"200": 1, "422": 1}
        assert totals["rejected"] == {"invalid": 1}
        assert (totals["answered"], totals["rows"]) == (1, 2)
        assert totals["runs"] == served.sample("inference_batch_rows_count")
        assert totals["tokens"] == served.sample("inference_tokens_total", kind="real")
        assert totals["padding_tokens"] == served.sample("inference_tokens_total", kind="padding")
        assert 0 < totals["inference_seconds"] <= totals["seconds"]
        assert totals["runner_busy_seconds"] > 0


async def test_what_waits_and_is_in_flight_is_seen_while_it_is(reviews: Model) -> None:
    model = held(reviews)
    async with Served(model) as served:
        asked = [asyncio.create_task(served.ask("/predict", "POST", PREDICT))]
        await until(lambda: model.entered)
        asked += [asyncio.create_task(served.ask("/predict", "POST", PREDICT)) for _ in range(2)]
        await until(lambda: served.sample("inference_queue_rows") == 2)
        state = (await served.ask("/state")).body
        assert (state["in_flight"], state["queue_rows"]) == (3, 2)
        model.opened.set()
        await asyncio.gather(*asked)
        state = (await served.ask("/state")).body
        assert (state["in_flight"], state["queue_rows"]) == (0, 0)


async def test_the_state_while_draining_says_so(reviews: Model) -> None:
    async with Served(reviews) as served:
        served.lifecycle.drain()
        answer = await served.ask("/state")
        assert answer.body["stage"] == "draining"
        assert answer.body["model"]["name"] == NAME
        assert answer.headers["connection"] == "close"


async def test_nothing_that_was_sent_is_in_the_state(reviews: Model) -> None:
    async with Served(reviews) as served:
        await served.ask("/predict", "POST", PREDICT)
        assert "heron" not in (await served.ask("/state")).text
