"""Engine builders: one file per runtime."""
