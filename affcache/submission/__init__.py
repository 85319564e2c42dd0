"""affcache submit: a challenge's template, every line filled."""
