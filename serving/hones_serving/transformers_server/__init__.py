"""Transformers' own server (`transformers.cli.serving`), steered, with the HTTP contract that vLLM has.

command.py     the process that `hones serve --engine transformers` becomes
app.py         its routes: transformers' and ours, without those that load or drop models; the API key
handlers.py    transformers' request handlers, which refuse fields that they would ignore, and look up admissions
turns.py       a request hears when its turn begins or will not come
generation.py  the generation thread: which requests are answered together, each steered as it was admitted
rows.py        one request in it: how its tokens are chosen, and who hears of them
continuous.py  continuous batching, from a paged cache
batching.py    one `generate` for several requests, or for one
exactness.py   which of these a model answers as it answers each request alone
stopping.py    the HTTP server, and its steps from SIGTERM until the process ends
"""
