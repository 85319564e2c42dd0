"""Work past one machine, on Ray: which schedules, restarts and talks over the network. An extra: affcache[ray]."""
