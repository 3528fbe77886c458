"""The programs on every node of a cluster: the agent, processes that wait to become ranks, copies in memory, checks."""
