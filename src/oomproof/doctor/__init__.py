"""Facts about this machine, checks over them, and one verdict a capability."""
