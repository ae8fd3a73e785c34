"""Debian's Chromium without a window, driven through its own driver, and what it asked whom."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: make test-page")

from axe_core_python.selenium import Axe
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Only ends a test that hangs.
PATIENCE_SECONDS = 60
ARGUMENTS = (
    # As root, in a container.
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
    # Chromium's own business is not the page's.
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Browser(Chrome):
    """A browser at one page. `find` and `until` wait for what comes later."""

    def find(self, selector: str) -> WebElement:
        return self.until(lambda: self.find_elements(By.CSS_SELECTOR, selector))[0]

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def until(self, condition: Any) -> Any:
        return WebDriverWait(self, PATIENCE_SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def until_said(self, words: str) -> None:
        """Until the live region has said it."""
        said = "return document.getElementById('said').textContent"
        self.until(lambda: words in self.execute_script(said))

    def emulate(self, **features: str) -> None:
        """Media features, such as prefers_color_scheme."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": given})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def complaints(self) -> list[str]:
        """What the console says since this was asked last: errors of scripts, what the policy did not allow. Not that
        a server refused a request or has ended."""
        return [entry["message"] for entry in self.get_log("browser") if entry["source"] != "network"]

    def asked(self) -> list[dict[str, Any]]:
        """Requests over a network since this was asked last."""
        messages = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        requests = [each["params"]["request"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [each for each in requests if urlsplit(each["url"]).scheme != "data"]

    def barriers(self) -> list[str]:
        """What axe finds wrong."""
        found = Axe().run(self, options={"resultTypes": ["violations"]})["violations"]
        return [f"{each['id']}: {[node['html'][:200] for node in each['nodes']]}" for each in found]


@contextmanager
def browser() -> Iterator[Browser]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Browser(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
