"""Months of a run against the real supervisor, with a clock of its own: python -m cluster.simulate."""
