"""The `virtfleet` command: one module per group of subcommands."""

from worker.cli.start import main

__all__ = ["main"]
