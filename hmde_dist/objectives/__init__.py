"""Vectors -> losses: gathering across ranks, and one file per published method."""
