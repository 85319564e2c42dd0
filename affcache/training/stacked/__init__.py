"""H heads of one shape trained side by side, written out over flat buffers."""
