"""The one process that starts, watches and restarts a run on many nodes: its state, its decisions and its messages."""
