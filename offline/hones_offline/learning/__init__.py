"""Learning: from a bank to a profile, by learned factors or by one of their baselines."""
