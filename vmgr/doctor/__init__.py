"""What stands between a node and its first guest: one module a subject, each a check that reads and then judges."""
