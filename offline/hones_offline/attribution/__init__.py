"""From examples to a bank: head scores, importance of neurons, and the methods these are compared with."""
