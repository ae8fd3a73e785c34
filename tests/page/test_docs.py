"""/docs in a real browser: Swagger UI from this server alone."""

from urllib.parse import urlsplit

import pytest

from tests.process import ServerProcess


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_operation_is_shown_and_no_other_host_is_asked(page, server, scheme):
    page.emulate(prefers_color_scheme=scheme)
    page.get(server.url + "/docs")
    page.find(".opblock")
    document = server.get("/openapi.json").json()["paths"]
    shown = page.find_elements("css selector", ".opblock")
    assert len(shown) == sum(len(operations) for operations in document.values())
    assert page.text(".opblock-summary-path") == "/predict"
    dark = page.execute_script("return document.documentElement.classList.contains('dark-mode')")
    assert dark is (scheme == "dark")
    assert {urlsplit(each["url"]).netloc for each in page.asked()} == {urlsplit(server.url).netloc}


def test_an_operation_is_tried_with_its_example(page, server):
    page.get(server.url + "/docs")
    page.find(".opblock-summary-control").click()
    page.find("button.execute").click()
    assert page.text(".live-responses-table tbody .response-col_status").startswith("200")
    assert {urlsplit(each["url"]).netloc for each in page.asked()} == {urlsplit(server.url).netloc}


def test_without_the_page_the_documentation_is_there(page):
    with ServerProcess(page="false") as process:
        page.get(process.ready().url + "/docs")
        page.find(".opblock")
        assert process.get("/").status_code == 404


# Of Swagger UI's own markup, which is not ours to change.
SWAGGERS_OWN = {"heading-order", "nested-interactive", "region"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_but_what_swagger_ui_brings(page, server, scheme):
    page.emulate(prefers_color_scheme=scheme)
    page.get(server.url + "/docs")
    page.find(".opblock")
    assert [each for each in page.barriers() if each.partition(":")[0] not in SWAGGERS_OWN] == []
