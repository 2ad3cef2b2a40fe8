"""`python -m transfer.bench`."""

from transfer.bench.cli import main

if __name__ == "__main__":
    main()
