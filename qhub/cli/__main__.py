"""Lets ``python -m qhub.cli`` run the command line where the script is not on the path."""

from qhub.cli import main

main()
