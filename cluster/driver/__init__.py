"""The driver: the only process that starts, watches and restarts a run on many nodes."""
