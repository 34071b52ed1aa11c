"""Text on disk -> shards (offline): documents, sentences, token ids, the two shard formats."""
