"""What a node counts, and how monitoring reads it."""
