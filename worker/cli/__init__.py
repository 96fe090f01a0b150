"""The `virtfleet` command: one module per group of subcommands."""

from worker.cli.main import main

__all__ = ["main"]
