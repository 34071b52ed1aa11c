"""Packed batch -> vectors: the hierarchical encoder, its configuration, its export."""
