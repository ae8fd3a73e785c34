"""`python -m app`."""

import logging

from app.signals import exit_before_start, on_stop

on_stop(exit_before_start)
# As app.telemetry.logging, but before any import: standard error has the one line that says why the process ended.
logging.captureWarnings(True)

from app.main import main  # noqa: E402
from app.settings import parse_arguments  # noqa: E402

parse_arguments()
main()
