"""Benchmarks: each measures a rate and its bare limit in one run, and gives their ratio."""
