"""One browser for all tests, a server for each module."""

from collections.abc import Iterator

import pytest

from tests.page.browser import CHROMIUM, DRIVER, Browser, browser


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromium-driver is not installed")
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser) -> Iterator[Browser]:
    """The browser as a new one would be; a test fails if a script did, or the policy forbade something."""
    chromium.get("about:blank")
    chromium.emulate(prefers_color_scheme="light")
    chromium.resize(1280, 900)
    chromium.complaints()
    chromium.asked()
    yield chromium
    assert chromium.complaints() == []
