"""Benchmarks: what the fleet takes, as a ratio to a yardstick measured in the same run on the same machine."""
