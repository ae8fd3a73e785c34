"""`python -m model.package`."""

from model.package.command import main

main()
