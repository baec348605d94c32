"""Writers of models for other runtimes: one file per format."""
