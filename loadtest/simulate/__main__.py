"""`python -m loadtest.simulate`."""

import sys

from loadtest.simulate.command import main

sys.exit(main())
