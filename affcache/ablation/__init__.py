"""Ablations: a grid of settings with seeds, trained side by side in groups off one read of the store, and compared."""
