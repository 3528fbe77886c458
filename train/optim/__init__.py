"""Optimizers of the weights, and schedules of the learning rate and other settings."""
