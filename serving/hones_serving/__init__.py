"""Serving: the HTTP contract of steering, the command `hones serve`, and the plugin for vLLM."""
