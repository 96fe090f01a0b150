"""Snapshots: caught at one instant, extracted into files of their own, published as a whole; and unmade."""
