"""Vectors -> numbers: encoding, FAISS index, retrieval, test collections, classification, bias, significance, baselines."""
