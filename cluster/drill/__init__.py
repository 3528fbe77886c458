"""Runs that are broken on purpose, many times: `python -m cluster.drill`."""
