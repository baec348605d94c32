"""Corrections of compressed weights: one file per method."""
