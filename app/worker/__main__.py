"""`python -m app.worker`."""

import logging

from app.signals import exit_before_start, on_stop

on_stop(exit_before_start)
# As in app.__main__.
logging.captureWarnings(True)

from app.settings import parse_arguments  # noqa: E402
from app.worker.main import DESCRIPTION, main  # noqa: E402

parse_arguments(command="python -m app.worker", description=DESCRIPTION)
main()
