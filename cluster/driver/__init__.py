"""The driver: the process that starts, watches and restarts a run on many nodes."""
