"""Sentence vectors of a recipe with a frozen sentence encoder, computed ahead of the training that reads them.

Training does the same by itself at its start; this program does it apart, on other machines or more of them. Killed, the
same command goes on with what is missing.
"""

from pathlib import Path

from hmde_dist import topology
from hmde_dist.command import InputError, argument_parser, run_command
from hmde_dist.engine.frozen import sentence_vectors
from hmde_dist.model.export import build_model
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import load_recipe


def main() -> None:
    parser = argument_parser(__doc__, "torchrun --nproc_per_node 8 tools/freeze.py recipes/hmde.yaml")
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--local_rank", help="set by the deepspeed launcher; not used")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides)
    if not recipe.model.lower.frozen:
        raise InputError("the recipe trains its sentence encoder: its vectors change every step (model.lower.frozen)")
    mixture = open_mixture(recipe)
    world = topology.join(recipe.engine.timeout_minutes)
    try:
        index, windows = mixture.indexes[0], mixture.settings.windows
        encoder = build_model(recipe.model, index, recipe.data.sentences, recipe.scale, recipe.run.seed, windows)
        for vectors in sentence_vectors(recipe, encoder, mixture.indexes, world):
            if world.is_first:
                print(
                    f"{int(vectors.layout.first_row[-1]):,} vectors of width {vectors.layout.width}: {vectors.folder}"
                )
    finally:
        topology.leave()


if __name__ == "__main__":
    run_command(main)
