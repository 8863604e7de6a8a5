"""Everything that happens on a node, as root unless a module says otherwise."""
