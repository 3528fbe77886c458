"""Programs that run on every node of a cluster: the agent, reserve processes, the store for in-memory copies of the
state, and the checks of a node."""
