"""What is fuzzed. Each target is a module here with `CASES` (a strategy), `EXAMPLES` (how many of them the tests try),
and `checking()`, which gives the check of a case."""

import importlib
from functools import partial
from typing import Any

from hypothesis import HealthCheck, settings

NAMES = ("http", "codec", "predict", "manifest")
# No verdict depends on how busy the machine is.
quietly = partial(settings, deadline=None, suppress_health_check=list(HealthCheck))


def target(name: str) -> Any:
    """The module of a target. Imported late: what is imported by then is not followed."""
    return importlib.import_module(f"{__name__}.{name}")
