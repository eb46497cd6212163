"""From a bank to a profile: learned factors, and the baselines of learning."""
