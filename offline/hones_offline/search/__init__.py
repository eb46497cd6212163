"""A profile from a task's data: selections, bank sizes and learning rates are tried, the best on dev is measured."""
