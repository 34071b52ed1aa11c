"""What is in a shard set: counts, languages and their pairs, lengths, categories, and groups decoded back to text."""

import json
from pathlib import Path

import numpy as np

from hmde_dist.command import argument_parser, output_file, positive, run_command
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.inspection import find_group, inspect, plot, read_groups, short

MATRIX_LANGUAGES = 12
PAIRS = 20


def main() -> None:
    parser = argument_parser(__doc__, "python tools/inspect_shards.py build/demo/shards/train --plot build/shards.png")
    parser.add_argument("shards", type=Path, metavar="DIR")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--samples", type=positive, default=1, help="groups shown as text, spread over the set (%(default)s)"
    )
    shown.add_argument("--group", metavar="ID", help="show this group instead; the samples are read until it is found")
    parser.add_argument("--sentences", type=positive, default=3, help="of each document that are shown (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw lengths, languages and categories")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and text that is printed")
    args = parser.parse_args()

    index = ShardIndex.open(args.shards)
    report = inspect(index)
    print_counts(report)
    print_languages(report["languages"])
    print_pairs(report["pairs"], list(report["languages"]))
    print_categories(report["categories"])
    if args.group is None:
        groups = np.linspace(0, index.groups - 1, min(args.samples, index.groups)).astype(int).tolist()
    else:
        groups = [find_group(index, args.group)]
    report["samples"] = read_groups(index, load_tokenizer(args.shards / "tokenizer"), groups, args.sentences)
    for sample in report["samples"]:
        print_sample(sample)
    print()
    if args.plot:
        plot(report, args.plot)
        print(f"plot written to {args.plot}")
    if args.json:
        with output_file(args.json) as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
        print(f"report written to {args.json}")


def print_counts(report: dict) -> None:
    """What the whole set holds."""
    size = report["bytes"] / 2**20
    print(f"{report['container']}, {report['shards']} shards, {size:.1f} MiB, hash {report['hash']}")
    print(
        f"{report['groups']:,} groups, {report['documents']:,} documents, {report['sentences']:,} sentences of at most "
        f"{report['sentence_tokens']} tokens, {report['tokens']:,} tokens of a vocabulary of {report['vocabulary']:,}"
    )
    print(f"long sentences cut: {report['long_sentences_cut']:,}; dropped: {report['dropped']}")
    held = [f"{n}: {groups:,}" for n, groups in report["groups_by_number_of_languages"].items()]
    print("groups by number of languages:", ", ".join(held))


def print_languages(languages: dict[str, dict]) -> None:
    """A line a language: sums, and median and 90th percentile per document."""
    print(
        f"\n{'language':<10}{'documents':>12}{'sentences':>14}{'tokens':>16}{'tokens per':>12}"
        f"{'sentences per document':>25}{'tokens per document':>22}"
    )
    print(f"{'':<10}{'(= groups)':>12}{'':>30}{'sentence':>12}{'median':>16}{'90 %':>9}{'median':>13}{'90 %':>9}")
    for language, facts in languages.items():
        sums = f"{facts['documents']:>12,}{facts['sentences']:>14,}{facts['tokens']:>16,}"
        row = f"{language:<10}{sums}{facts['tokens_per_sentence']:>12.1f}"
        for lengths, width in ((facts["document_sentences"], 16), (facts["document_tokens"], 13)):
            row += f"{lengths['median']:>{width},.0f}{lengths['90%']:>9,.0f}"
        print(row)


def print_pairs(pairs: list[dict], languages: list[str]) -> None:
    """A matrix, or of more than `MATRIX_LANGUAGES` languages the `PAIRS` largest pairs."""
    if len(languages) > MATRIX_LANGUAGES:
        print(f"\nthe {min(PAIRS, len(pairs))} largest of {len(pairs)} language pairs")
        for pair in pairs[:PAIRS]:
            print(f"  {'-'.join(pair['languages']):<18}{pair['groups']:>12,} groups{pair['tokens']:>16,} tokens")
        return
    print("\nlanguage pairs: groups that hold both (above the diagonal), tokens of their documents (below)")
    print(" " * 8 + "".join(f"{language:>8}" for language in languages))
    cells = {}
    for pair in pairs:
        first, second = pair["languages"]
        cells[first, second], cells[second, first] = short(pair["groups"]), short(pair["tokens"])
    for row in languages:
        print(f"{row:<8}" + "".join(f"{'-' if row == c else cells.get((row, c), '0'):>8}" for c in languages))


def print_categories(categories: dict) -> None:
    """How many, how large, and the largest."""
    print(
        f"\n{categories['count']:,} categories; {categories['groups_without']:,} groups "
        f"({categories['share_without']:.1%}) have none"
    )
    if categories["count"]:
        print("groups in a category:", ", ".join(f"{name} {size:g}" for name, size in categories["quantiles"].items()))
        for category in categories["largest"]:
            print(f"  {category['groups']:>8,} groups  {category['name']}")


def print_sample(sample: dict) -> None:
    """One group in all its languages."""
    print(f"\n{sample['id']}  [{sample['category'] or 'no category'}]")
    for document in sample["documents"]:
        print(f"  {document['language']}: {document['sentences']:,} sentences, {document['tokens']:,} tokens")
        for sentence in document["first"]:
            print(f"    {sentence['tokens']:>3} tokens  {sentence['text']}")


if __name__ == "__main__":
    run_command(main)
