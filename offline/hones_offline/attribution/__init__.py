"""Attribution: from examples to a bank, by head scores and importance of neurons, or by another method."""
