"""Weight quantization: one file per method."""
