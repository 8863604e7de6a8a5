"""The guests' networks: planned alike on every node of a job, made by the node's agent, undone from its record."""
