"""`python -m app`."""

import logging

# As app.telemetry.logging, but before any import: standard error has the one line that says why the process ended.
logging.captureWarnings(True)

from app.main import main  # noqa: E402

main()
