"""Embeddings to and from other tools: what the published code, clip-retrieval and ``affcache export`` wrote."""
