"""The run of a rank: steps, what is measured in them, where they start and how they end."""
