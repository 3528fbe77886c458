"""Programs on every node of a cluster: agent, reserve processes, store for in-memory copies of the state, node checks."""
