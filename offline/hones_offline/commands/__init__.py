"""The commands of the offline tool: `hones attribute`, `hones fit` and `hones evaluate`."""
