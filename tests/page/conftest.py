"""One browser for all tests here, as a new one to each. Without selenium or Chromium they are skipped."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.page.browser import Browser


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    # Not above: a skip in the import of this file would end the collection of all tests.
    from tests.page.browser import CHROMIUM, DRIVER, browser

    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromium-driver is not installed")
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: "Browser") -> Iterator["Browser"]:
    """A test fails if a script did, or if the policy forbade something."""
    chromium.get("about:blank")
    chromium.emulate(prefers_color_scheme="light")
    chromium.resize(1280, 900)
    chromium.complaints()
    chromium.asked()
    yield chromium
    assert chromium.complaints() == []
