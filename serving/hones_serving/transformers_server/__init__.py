"""Transformers' own server (`transformers.cli.serving`), steered, with the HTTP contract that vLLM has.

command.py     the process that `hones serve --engine transformers` becomes
app.py         its routes: transformers' and ours, without those that load or drop models; the API key
handlers.py    transformers' request handlers, which refuse fields that they would ignore, and look up admissions
turns.py       the queue for the generation thread: a request hears when its turn begins or will not come
generation.py  the generation thread: each request is steered as it was admitted
stopping.py    the HTTP server, and its steps from SIGTERM until the process ends
"""
