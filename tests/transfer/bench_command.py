"""The benchmark's command line in the tests' own process."""

import signal

from transfer.bench.cli import main


def main_here(*arguments):
    """Run it; the handler of SIGTERM is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
