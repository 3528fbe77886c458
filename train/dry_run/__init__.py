"""Runs one rank of a job alone, and compares it with the plan."""
