"""A small, really trained language model with its texts, for demonstrations and tests."""
