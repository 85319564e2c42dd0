"""The embedding store: its layout in HDF5, reading, writing, and reading ahead. Knows no torch but to prefetch."""
