"""`python -m flows.cli`, which is `plumbline`."""

from flows.cli import main

main()
