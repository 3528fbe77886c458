"""Programs on every node: agent, reserve processes, copy store, node checks."""
