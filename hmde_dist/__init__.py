"""HMDE-dist: distributed pretraining of hierarchical multilingual document encoders."""

__version__ = "0.1.0"
