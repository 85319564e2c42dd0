"""affcache fit: heads, CVaR, SAM, the training core, run folders, and scikit-learn's estimators."""
