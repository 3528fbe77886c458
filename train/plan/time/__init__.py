"""Plans the time of a step."""
