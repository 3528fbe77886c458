"""The run of a rank: start, steps, measurements and end."""
