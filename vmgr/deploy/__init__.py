"""Installing over a cluster."""
