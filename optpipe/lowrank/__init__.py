"""Low-rank factorization: one file per method."""
