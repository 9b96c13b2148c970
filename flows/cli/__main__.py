"""`python -m flows.cli`, which is `plumbline`."""

from flows.cli import main

if __name__ == "__main__":
    main()
