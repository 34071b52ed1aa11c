"""Vectors -> numbers: encoding, FAISS index, retrieval, baselines."""
