"""What is in a shard set: counts, languages, lengths, categories, and samples decoded back to text."""

from pathlib import Path

import numpy as np

from hmde_dist.command import argument_parser, positive, run_command
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader


def main() -> None:
    parser = argument_parser(__doc__, "python tools/inspect_shards.py build/demo/shards/train --samples 2")
    parser.add_argument("shards", type=Path, metavar="DIR")
    parser.add_argument(
        "--samples", type=positive, default=1, help="groups shown as text, spread over the set (%(default)s)"
    )
    args = parser.parse_args()
    index = ShardIndex.open(args.shards)
    manifest, columns = index.manifest, index.columns
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{manifest['container']}, {len(manifest['shards'])} shards, {size / 2**20:.1f} MiB, hash {index.hash}")
    print(
        f"{index.groups:,} groups, {manifest['documents']:,} documents, {manifest['sentences']:,} sentences of at most "
        f"{manifest['sentence_tokens']} tokens, {manifest['tokens']:,} tokens of a vocabulary of {manifest['vocabulary']:,}"
    )
    print(f"long sentences cut: {manifest['long_sentences_cut']:,}; dropped: {manifest['dropped']}")
    print(f"\n{'language':<10}{'documents':>10}{'sentences: median':>20}{'90 %':>7}{'tokens: median':>17}{'90 %':>7}")
    for number, language in enumerate(index.languages):
        mine = columns["document_language"] == number
        row = f"{language:<10}{mine.sum():>10}"
        for name, width in (("document_sentences", 20), ("document_tokens", 17)):
            median, high = np.percentile(columns[name][mine], [50, 90])
            row += f"{median:>{width}.0f}{high:>7.0f}"
        print(row)
    counts = np.bincount(columns["group_cluster"], minlength=len(manifest["clusters"]))
    print(f"\n{(counts > 0).sum()} categories; the largest:")
    for cluster in np.argsort(-counts, kind="stable")[:5]:
        if counts[cluster]:
            print(f"  {counts[cluster]:>6} groups  {manifest['clusters'][cluster] or '(none)'}")
    tokenizer, reader = load_tokenizer(args.shards / "tokenizer"), GroupReader(index)
    for group in np.linspace(0, index.groups - 1, min(args.samples, index.groups)).astype(int):
        sample = reader[int(group)]
        print(f"\n{sample.id}  [{manifest['clusters'][columns['group_cluster'][group]]}]")
        for number, language in enumerate(sample.languages):
            tokens, lengths = sample.document(number)
            sentences = np.split(tokens, np.cumsum(lengths)[:-1])
            print(f"  {language}: {len(lengths)} sentences")
            for sentence in sentences[:2]:
                print(f"    {len(sentence):>3} tokens  {tokenizer.decode(sentence.tolist())}")


if __name__ == "__main__":
    run_command(main)
