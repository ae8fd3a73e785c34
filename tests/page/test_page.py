"""The page at / in a real browser: what is typed, what is answered, who is asked, and who can use it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import onnx_models, task_models
from tests.page.browser import Browser
from tests.page.subpath import SubPath
from tests.process import ServerProcess
from tests.text_model import LABELS, NAME, VERSION

PATIENT = {"max_queue_wait_ms": 600_000, "request_timeout_ms": 600_000}
SECRET = "a wonderful walrus"
TASKS = sorted(task_models.BUILD)


def send(page: Browser, text: str) -> None:
    field = page.find("#text")
    field.clear()
    field.send_keys(text)
    page.find(".primary").click()
    page.find(".timing")


def asked_of_model(page: Browser) -> list[dict]:
    return [each for each in page.asked() if each["method"] == "POST"]


@pytest.fixture(scope="module")
def two(package: Callable[..., Path]) -> Iterator[ServerProcess]:
    """The server of a model of tensors."""
    with ServerProcess(package(onnx_models.two_outputs, "two"), **PATIENT) as process:
        yield process.ready()


def test_a_text_is_answered_with_its_label_scores_and_where_the_time_went(page, server):
    page.get(server.url + "/")
    send(page, "what a lovely day")
    assert page.text(".verdict").startswith("positive")
    bars = [each.text.split("\n")[0] for each in page.find_elements("css selector", ".bar")]
    assert sorted(bars) == sorted(LABELS)
    legend = page.text(".legend")
    assert [each in legend for each in ("Queue", "Run", "Network")] == [True] * 3
    assert f"{NAME}/{VERSION}" in page.text(".meta")
    page.until_said("positive")


def test_lines_are_one_batch_and_answered_in_their_order(page, server):
    page.get(server.url + "/")
    page.find("label[for=several]").click()
    send(page, "a lovely day\n\nan awful day\na great day")
    rows = [each.text.split() for each in page.find_elements("css selector", ".answer tbody tr")]
    assert [row[3] for row in rows] == ["positive", "negative", "positive"]
    (request,) = asked_of_model(page)
    assert urlsplit(request["url"]).path == "/predict/batch"
    assert len(json.loads(request["postData"])["texts"]) == 3


def test_an_example_is_sent_at_once(page, server):
    page.get(server.url + "/")
    page.find(".chip").click()
    page.find(".timing")
    assert page.find("#text").get_property("value") == page.text(".chip")


def test_the_curl_command_is_the_request(page, server):
    page.get(server.url + "/")
    page.find("summary").click()
    field = page.find("#text")
    field.clear()
    field.send_keys('it\'s "fine"')
    command = page.find(".curl code").get_property("textContent")
    assert command.startswith(f"curl '{server.url}/predict' -H 'content-type: application/json' --data-raw ")
    assert command.endswith(r"""'{"text":"it'\''s \"fine\""}'""")


def test_what_is_typed_is_in_no_address_no_log_and_no_storage(page, server):
    page.get(server.url + "/")
    send(page, SECRET)
    requests = page.asked()
    assert [each["url"] for each in requests if "walrus" in each["url"]] == []
    assert [each["method"] for each in requests if "walrus" in each.get("postData", "")] == ["POST"]
    assert "walrus" not in server.output() + server.errors()
    assert page.execute_script("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_no_other_host_is_asked_and_nothing_breaks_the_policy(page, server):
    page.get(server.url + "/")
    send(page, "fine")
    assert {urlsplit(each["url"]).netloc for each in page.asked()} == {urlsplit(server.url).netloc}


def test_an_image_or_script_of_another_host_would_not_be_loaded(page, server):
    page.get(server.url + "/")
    page.execute_script("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)")
    page.until(lambda: any("Content Security Policy" in each for each in page.complaints()))


def test_the_state_of_the_server_is_shown_and_changes(page, server):
    page.get(server.url + "/")
    page.until(lambda: page.text("#stage") == "ready")
    assert (page.text("#name"), page.text("#version")) == (NAME, f"version {VERSION}")
    facts = page.text("#facts")
    assert "text-classification" in facts
    assert "CPU" in facts
    before = page.text("#counts")
    send(page, "fine")
    page.until(lambda: page.text("#counts") != before)
    titles = [each.text for each in page.find_elements("css selector", "figcaption")]
    assert {"Requests", "Latency", "Refused", "In flight", "Padding"} <= set(titles)
    page.until(lambda: page.find(".chart .line").get_attribute("d"))


def test_nothing_is_asked_while_the_page_is_hidden(page, server):
    page.get(server.url + "/")
    page.until(lambda: page.text("#stage") == "ready")
    page.execute_script(
        "Object.defineProperty(document, 'hidden', {get: () => window.away}); window.away = true;"
        "document.dispatchEvent(new Event('visibilitychange')); window.count = 0;"
        "const real = window.fetch; window.fetch = (...all) => { window.count += 1; return real(...all); };"
        "const timer = window.setTimeout; window.timers = 0;"
        "window.setTimeout = (...all) => { window.timers += 1; return timer(...all); };"
    )
    assert page.execute_script("return [window.count, window.timers]") == [0, 0]
    page.execute_script("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: page.execute_script("return window.count") >= 1)


def test_a_refusal_is_shown_in_the_servers_words(page):
    with ServerProcess(max_body_bytes=100) as small:
        page.get(small.ready().url + "/")
        page.find("#text").send_keys("long " * 50)
        page.find(".primary").click()
        assert page.text(".problem").startswith("413: body: expected at most 100 bytes")


def test_a_server_that_ends_is_shown_as_draining_and_then_as_not_answering(page):
    with ServerProcess(drain_delay_seconds=8) as ending:
        page.get(ending.ready().url + "/")
        page.until(lambda: page.text("#stage") == "ready")
        ending.terminate()
        page.until(lambda: page.text("#stage") == "draining")
        assert "still answered" in page.text("#notice")
        page.until(lambda: page.text("#stage") == "not answering")
        page.until_said("not answering")


def test_before_it_is_ready_the_page_says_at_which_stage_the_server_is(page, server):
    """With what the server says then, since a stage may be over before a browser has seen it."""
    page.get(server.url + "/")
    page.until(lambda: page.text("#stage") == "ready")
    page.execute_script(
        "const before = {stage: 'warming', stuck: null, model: null, replica: 'a', started_unix_seconds: 1,"
        " clock_seconds: 1, queue_rows: 0, in_flight: 0, server: 's', server_version: '1',"
        " totals: {requests: {}, rejected: {}}};"
        "window.fetch = async () => new Response(JSON.stringify(before));"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.until(lambda: page.text("#stage") == "warming")
    assert "Not ready yet: warming" in page.text("#notice")


def test_tensors_have_a_form_from_their_metadata(page, two):
    page.get(two.url + "/")
    page.find("#values-0")
    page.find(".primary").click()
    page.find(".timing")
    outputs = [each.text for each in page.find_elements("css selector", ".answer tbody th")]
    metadata = two.get("/v2/models/two").json()
    assert outputs == [each["name"] for each in metadata["outputs"]]
    field = page.find("#values-0")
    field.clear()
    field.send_keys("not numbers")
    page.find(".primary").click()
    assert "is no number" in page.text(".problem")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_form_that_is_answered_and_has_no_barrier(page, tmp_path, task):
    with ServerProcess(task_models.BUILD[task](tmp_path / "artifact"), **PATIENT) as process:
        page.get(process.ready().url + "/")
        page.find("form")
        if task == "image-classification":
            (tmp_path / "picture.png").write_bytes(task_models.picture())
            page.find("#image").send_keys(str(tmp_path / "picture.png"))
        page.find(".primary").click()
        page.find(".timing")
        assert page.barriers() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_barrier_at_any_width_in_light_and_dark(page, server, scheme, width):
    page.emulate(prefers_color_scheme=scheme)
    page.resize(width, 800)
    page.get(server.url + "/")
    page.find("summary").click()
    page.find("label[for=several]").click()
    send(page, "a lovely day\nan awful day")
    assert page.barriers() == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_keyboard_is_enough(page, server):
    page.get(server.url + "/")
    page.find("form")
    reached = []
    for _ in range(20):
        page.switch_to.active_element.send_keys("\ue004")
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
        if active.text == "Send":
            break
    assert {"Documentation", "single", "text", "Send"} <= set(reached)
    page.find("#text").send_keys("\ue009\ue007")
    page.find(".timing")


def test_who_wants_less_motion_gets_none(page, server):
    page.emulate(prefers_reduced_motion="reduce")
    page.get(server.url + "/")
    send(page, "fine")
    style = "return getComputedStyle(document.querySelector('.fill')).transition"
    assert page.execute_script(style).startswith("none")


def test_it_works_under_a_sub_path(page, server):
    with SubPath(server.port, "/models/reviews") as url:
        page.get(url + "/")
        page.until(lambda: page.text("#stage") == "ready")
        send(page, "what a lovely day")
        assert page.text(".verdict").startswith("positive")
        paths = {urlsplit(each["url"]).path for each in page.asked()}
        assert {path for path in paths if not path.startswith("/models/reviews/")} == set()
        page.get(url + "/docs")
        page.find(".opblock")
        page.find(".opblock-summary-control").click()
        page.find("button.execute").click()
        page.until(lambda: asked_of_model(page))
