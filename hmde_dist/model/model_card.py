"""The README of an exported model: what it is, what it read, how it was trained, what it reached, how to use it.

Everything comes from the run folder. Paths stay out: a card is made to be published. The licence is the user's to state.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from hmde_dist.command import output_file
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.stream.index import ShardIndex

# Where data lie and how a run is looked after says nothing about the model.
LEFT_OUT = {
    "data": ("shards", "validation", "cache", "cache_limit_gib", "workers"),
    "run": ("folder", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "resume"),
}


def save_data_facts(indexes: Sequence[ShardIndex], folder: Path) -> None:
    """Write what the card says of the training data, `data.json`, so that an export needs no shards."""
    facts = []
    for index in indexes:
        counts = np.bincount(index.columns["document_language"], minlength=len(index.languages))
        facts.append(
            {
                "sources": [source["name"] for source in index.manifest.get("sources", [])],
                **{name: index.manifest[name] for name in ("groups", "documents", "sentences", "tokens")},
                "hash": index.hash,
                "documents_by_language": dict(zip(index.languages, counts.tolist(), strict=True)),
            }
        )
    with output_file(folder / "data.json") as file:
        json.dump(facts, file, indent=1, ensure_ascii=False)


def model_card(config: HMDEConfig, run: Path | None = None, step: int = 0, merged: str = "") -> str:
    """The card in Markdown; without a run folder, or with parts of it missing, it says less.

    Args:
        step: of the checkpoint; the validation is the last one up to it.
        merged: what its weights were made of, if not of one training alone.
    """
    data = (
        json.loads((run / "model" / "data.json").read_text("utf-8")) if run and _is(run / "model" / "data.json") else []
    )
    counts: dict[str, int] = {}
    for source in data:
        for language, documents in source["documents_by_language"].items():
            counts[language] = counts.get(language, 0) + documents
    languages = [language for language in sorted(counts) if counts[language]]
    front = ["library_name: sentence-transformers", "pipeline_tag: feature-extraction"]
    front += ["tags: [feature-extraction, document-embedding, multilingual]"]
    if languages:
        # Quoted: Norwegian is "no", which YAML reads as false.
        front.append("language: " + json.dumps(sorted({language.split("-")[0] for language in languages})))
    front.append("# license: (yours to state; mind that of the training texts and of the pretrained encoder)")
    lower = config.lower
    origin = (
        f"weights of `{Path(config.lower_source).name}` at the start" if config.lower_source else "trained from scratch"
    )
    upper = f"transformer, {config.upper_positions} positions" if config.upper_layers else "none"
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        "# A hierarchical multilingual document encoder",
        "A whole document becomes one vector; versions of a document in different languages lie close together. Method: "
        "[arXiv 2305.07016](https://arxiv.org/abs/2305.07016), trained with HMDE-dist.",
        "## Use",
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("PATH", trust_remote_code=True)\n'
        'vectors = model.encode(["A document of several sentences. ...", "Ein Dokument. ..."])\n```',
        f"Texts are {_how_cut(config)} Compare vectors by cosine.",
        "## Architecture",
        _table(
            [
                ["", "sentence encoder", "document encoder"],
                ["kind", f"{lower['model_type']}, {origin}", upper],
                ["layers", lower.get("num_hidden_layers"), config.upper_layers],
                ["heads", lower.get("num_attention_heads"), config.upper_heads if config.upper_layers else None],
                ["width", config.hidden_size, config.hidden_size],
                ["pooling", config.sentence_pooling, config.document_pooling],
                ["vocabulary", lower.get("vocab_size"), ""],
            ]
        ),
    ]
    if merged:
        parts += ["## Merged", f"The weights are {merged}. No validation was of these weights."]
    if data:
        parts += ["## Training data", "Documents that share an id are versions of one document: a group."]
        rows = [["source", "groups", "documents", "sentences", "tokens", "fingerprint"]]
        for source in data:
            names = ", ".join(source["sources"][:5]) + (" and more" if len(source["sources"]) > 5 else "")
            numbers = [source[name] for name in ("groups", "documents", "sentences", "tokens")]
            rows.append([names or "not recorded", *numbers, source["hash"]])
        largest = sorted(languages, key=lambda language: (-counts[language], language))
        parts += [
            _table(rows),
            f"Documents by language ({len(languages)}): "
            + ", ".join(f"{name} {counts[name]:,}" for name in largest)
            + ".",
        ]
    settings = _settings(run) if run else []
    if settings:
        parts += ["## Training settings", _table([["setting", "value"], *settings])]
    scores = _validation(run, step) if run and not merged else {}
    if scores:
        parts += [
            "## Validation",
            f"After step {scores.pop('step'):,}, on documents that were in no language of the training data; means over all "
            "language pairs.",
            _table([["measure", "value"], *([name, f"{value:.3f}"] for name, value in scores.items())]),
        ]
    return "\n\n".join(parts) + "\n"


def _how_cut(config: HMDEConfig) -> str:
    if config.segments:
        return (
            f"cut into windows of {config.segments['window']} tokens, each {config.segments['stride']} tokens behind the one "
            f"before; of a document {config.max_sentences} windows are read at most."
        )
    return (
        f"split into sentences inside. A document is read up to {config.max_sentences} sentences of {config.sentence_tokens} "
        "tokens; what is longer is cut into more sentences, what is behind is not read."
    )


def _is(path: Path) -> bool:
    return path.is_file()


def _settings(run: Path) -> list[list[str]]:
    """Settings that shape the model, as the run's recipe has them."""
    if not _is(run / "config.yaml"):
        return []
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    rows = []
    for number, objective in enumerate(tree.get("objectives") or []):
        rows += [
            [f"objectives.{number}.{k}", json.dumps(v, ensure_ascii=False)]
            for k, v in objective.items()
            if v is not None
        ]
    for section in ("data", "optimizer", "run"):
        for name, value in (tree.get(section) or {}).items():
            if name not in LEFT_OUT.get(section, ()) and value is not None:
                rows.append([f"{section}.{name}", json.dumps(value, ensure_ascii=False)])
    return [*rows, ["engine.precision", json.dumps(tree["engine"]["precision"])]]


def _validation(run: Path, step: int) -> dict[str, float]:
    """Step and scores of the last validation in the journal up to `step`."""
    if not _is(run / "journal.jsonl"):
        return {}
    found = {}
    for line in (run / "journal.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        if '"event": "validation"' in line:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            # After a kill steps occur twice: the later line counts.
            if found.get("step", 0) <= record["step"] <= step:
                found = record
    return {name: value for name, value in found.items() if name not in ("time", "event")}


def _table(rows: Sequence[Sequence]) -> str:
    """Markdown; the first row is the head."""
    cells = [
        ["" if c is None else f"{c:,}" if isinstance(c, int) else str(c).replace("|", "\\|") for c in row]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))
