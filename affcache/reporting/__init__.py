"""A run's report: one HTML file with its scores, curves, hardest frames and timelines, which needs no network."""
