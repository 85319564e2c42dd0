"""affcache score: predictions of frames, decisions, calibration, intervals and figures."""
