"""Transformers' own server (`transformers.cli.serving`), steered, with the HTTP contract that vLLM has.

command.py     the process that `hones serve --engine transformers` becomes
app.py         its routes: transformers' and ours, without those that load or drop models; the API key
handlers.py    what a request's body may say; from an admission's ticket to the admission
turns.py       who waits for the generation thread, and who is told that the turn will not come
generation.py  in the generation thread: each request steered as it was admitted
stopping.py    the HTTP server, and what it does from SIGTERM until the process ends
"""
