"""affcache extract and doctor: crops decoded, encoded and committed at the same time."""
