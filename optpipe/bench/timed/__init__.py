"""The paired, interleaved timing of one cell, and whether it is a measurement at all."""
