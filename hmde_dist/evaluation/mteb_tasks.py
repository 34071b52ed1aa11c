"""MTEB tasks with an exported model (https://github.com/embeddings-benchmark/mteb), from folders or from the hub.

Owns the wrapper that mteb asks for and where data come from; tasks, splits, heads and metrics are mteb's. With a data
folder nothing is fetched: a task reads FOLDER/<its dataset's name on the hub>, as `hf download --repo-type dataset
mteb/MultiLongDocReranking --local-dir FOLDER/mteb/MultiLongDocReranking` makes it. mteb is an extra of this project.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.model.modeling_hmde import HMDEModel

# Tasks whose texts are documents in many languages, the cheapest first (mean characters of a text).
DOCUMENT_TASKS = (
    "SwissJudgementClassification",  # 3,506; de fr it
    "MasakhaNEWSClassification",  # 2,715; 16 languages of Africa
    "MasakhaNEWSClusteringP2P",
    "MLSUMClusteringP2P.v2",  # 4,508; de fr ru es
    "NeuCLIR2022RetrievalHardNegatives",  # 2,068; fas rus zho
    "NeuCLIR2023RetrievalHardNegatives",  # 2,237
    "MultiLongDocReranking",  # 16,119; 13 languages
    "MultiEURLEXMultilabelClassification",  # 12,014; 23 languages
    "MultiLongDocRetrieval",  # 13,453; 13 languages, 493,709 documents
)


def run_tasks(
    model: HMDEModel,
    names: Sequence[str],
    languages: Sequence[str] | None = None,
    data: Path | None = None,
    batch_size: int = 32,
) -> dict:
    """Scores of `model` in the MTEB tasks `names`.

    Args:
        languages: ISO 639-3 codes ("deu") of the subsets to run; none = all that a task has.
        data: folder of datasets; none = mteb fetches them from the hub.

    Returns:
        `mteb` (version) and `tasks`: by task `metric`, `score` (mean over subsets) and `subsets`, by name.

    Raises:
        InputError: mteb is not installed, no such task, or data that are not there.
    """
    mteb = _mteb()
    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name, languages=list(languages) if languages else None))
        except KeyError as error:
            raise InputError(f"--tasks {name}: {error.args[0]}") from None
        except ValueError as error:  # no such code, or no subset in it
            raise InputError(f"--languages: {error}") from None
    for task in tasks:
        # Some tasks also name their development split.
        if "test" in task.metadata.eval_splits:
            task.filter_eval_splits(["test"])
        if data is not None:
            # The path of a dataset may be a folder; a revision is of the hub.
            task.metadata = task.metadata.model_copy(deep=True)
            folder = Path(data) / task.metadata.dataset["path"]
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder; {task.metadata.name} reads its dataset there")
            task.metadata.dataset["path"] = str(folder)
    wrapped = encoder(model, batch_size)
    report: dict = {"mteb": mteb.__version__, "tasks": {}}
    for task in tasks:
        try:
            task.load_data()
        except (OSError, ValueError) as error:
            way_out = "copy it to a folder and name that by --data" if data is None else "copy it again"
            raise InputError(
                f"{task.metadata.dataset['path']}: not the data of {task.metadata.name} ({error}); {way_out}"
            ) from None
        # Without mteb's cache: it knows models by name, and every export is another one.
        result = mteb.evaluate(wrapped, task, cache=None, co2_tracker=False)
        (result,) = result.task_results
        (split,) = list(result.scores)[:1]
        subsets = {scores["hf_subset"]: float(scores["main_score"]) for scores in result.scores[split]}
        report["tasks"][task.metadata.name] = {
            "metric": task.metadata.main_score,
            "split": split,
            "score": float(np.mean(list(subsets.values()))),
            "seconds": round(result.evaluation_time or 0.0, 1),
            "subsets": subsets,
        }
    return report


def encoder(model: HMDEModel, batch_size: int = 32):
    """`model` as mteb wants it: texts of a loader in, vectors out, compared by cosine."""
    _mteb()
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    class Encoder(AbsEncoder):
        def __init__(self):
            self.model = model
            self.mteb_model_meta = ModelMeta.create_empty(
                {
                    "name": f"hmde/{Path(model.config.name_or_path).name}",
                    "revision": "export",
                    "similarity_fn_name": ScoringFunction.COSINE,
                    "embed_dim": model.config.hidden_size,
                    "max_tokens": model.most_tokens,
                }
            )

        def encode(self, inputs, **_) -> np.ndarray:
            # A batch of the loader also holds titles and the like; its text is title and text of a document.
            texts = [text for batch in inputs for text in batch["text"]]
            return model.encode(texts, batch_size=batch_size)

    return Encoder()


def _mteb() -> ModuleType:
    try:
        import mteb
    except ImportError as error:
        raise InputError(f'MTEB tasks need mteb ({error}): pip install -e ".[mteb]"') from None
    return mteb
