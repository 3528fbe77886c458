"""Runs the training on one rank: start, steps, measurements and end."""
