"""Optimizers of the weights, their moving average, and the schedules of their settings."""
