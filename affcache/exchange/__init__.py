"""Embeddings to and from other tools: what the published code, clip-retrieval and ``affcache export`` wrote.

``keys`` says which frame a row is; ``sources`` is the form that every source is brought into; ``published_code``,
``clip_retrieval`` and ``exports`` read one layout each; ``importing`` and ``exporting`` are the commands as a whole.
"""
