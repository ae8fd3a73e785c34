"""`python -m model.compare`."""

from model.compare.command import main

main()
