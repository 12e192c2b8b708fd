"""From a model and a machine to a plan: what goes where, in which format, and whether it fits."""
