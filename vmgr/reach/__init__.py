"""How `vmgr` reaches what it does not find on its own node: which nodes there are, and the way to them."""
