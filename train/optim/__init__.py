"""What changes the weights: AdamW, their average, and the schedules of its settings."""
