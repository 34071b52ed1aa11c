"""Shards -> packed global batches (online): index, plan, reader, packing, loader."""
