"""A node's CPUs and memory: read, drawn, and divided among guests."""
