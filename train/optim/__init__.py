"""Optimizers of the weights, and schedules of settings."""
