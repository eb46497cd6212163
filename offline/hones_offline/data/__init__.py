"""Examples, tasks, metrics and neuron banks: what the method is given and what it yields. Nothing here runs a model."""
