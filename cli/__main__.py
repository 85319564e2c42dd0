"""Lets ``python -m affcache.cli`` stand for the command ``affcache``."""

from .app import main

main()
