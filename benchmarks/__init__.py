"""Benchmarks: each measures a rate and its bare limit in one run, and gives their ratio. Not installed."""

import os
from importlib.util import find_spec
from pathlib import Path

import affcache

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: waiting threads sleep

if find_spec("affcache.data") is None:  # a checkout that isn't installed, whose data/ and cli/ lie beside affcache/
    affcache.__path__.append(str(Path(__file__).parents[1]))
