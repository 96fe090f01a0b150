"""`python -m worker.cli` is `virtfleet`."""

from worker.cli.main import main

main()
