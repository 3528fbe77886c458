"""Runs one rank of a job alone on the present device, and compares it with its plan."""
