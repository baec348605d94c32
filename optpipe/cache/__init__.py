"""Quantization of the KV cache: one file per method."""
