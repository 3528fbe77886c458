"""Plans the memory of every rank."""
