import numpy as np

from hmde_dist.corpus.synthetic import SENTENCE_TOKENS, synthetic_shards
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader


def test_random_documents_have_the_asked_vocabulary_and_the_assumed_lengths(tmp_path):
    index = ShardIndex.open(synthetic_shards(40, tmp_path, vocabulary=3000))
    manifest = index.manifest
    assert (manifest["groups"], manifest["documents"], manifest["vocabulary"]) == (40, 80, 3000)
    assert manifest["languages"] == ["de", "en"]
    assert index.columns["group_cluster"].all()  # every group has category neighbours
    read = GroupReader(index)[0]
    assert read.sentence_lengths.max() <= SENTENCE_TOKENS and read.tokens.max() < 3000
    sentences = index.columns["document_sentences"]
    assert 12 < np.median(sentences) < 26
    assert 18 < index.columns["document_tokens"].sum() / sentences.sum() < 40
