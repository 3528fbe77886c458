"""Optimizers of the weights, and the schedules of their settings."""
