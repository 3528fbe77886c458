"""Runs one rank of a job alone on this device, and compares the measurements with the plan."""
