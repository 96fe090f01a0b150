"""`python -m worker.cli` is `virtfleet`."""

from worker.cli.start import main

main()
