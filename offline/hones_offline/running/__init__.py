"""A model run for the method: hooks, KV cache, decoder, encoded prompts, evaluation, and what a run keeps on disk."""
