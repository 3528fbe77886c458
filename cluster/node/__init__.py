"""Programs that run on every node of a cluster: the agent, reserve processes, copies in memory and checks."""
