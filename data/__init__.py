"""What ships with affcache as data: read it through ``importlib.resources.files("affcache.data")``."""
