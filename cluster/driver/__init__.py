"""The one process that starts, watches and restarts a run on many nodes: what it knows, decides and says."""
