"""hones-steer: per-request scaling of a vision-language model's FFN neurons."""
