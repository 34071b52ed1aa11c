"""Submit a training run to Slurm with submitit, or run the same job on this machine with `--profile local`."""

from pathlib import Path

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.recipe import dump_recipe, load_recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.submission import TrainingJob, batch_script, load_profile, submit

PROFILES = Path(__file__).parent / "profiles"


def main() -> int | None:
    parser = argument_parser(
        __doc__, "python slurm/launch.py recipes/demo.yaml --profile gpu --nodes 2 --dry-run run.steps=1000"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--profile", required=True, metavar="NAME", help="a file of slurm/profiles/, without .yaml")
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and the recipe; submit nothing")
    parser.add_argument("--wait", action="store_true", help="stay until the job ends, with its exit code")
    args = parser.parse_intermixed_args()
    profile = load_profile(PROFILES / f"{args.profile}.yaml")
    recipe = load_recipe(args.recipe, args.overrides)
    folder = recipe.run.folder / "jobs"
    ranks = args.nodes * profile.tasks_per_node
    if recipe.data.pairs_per_batch % ranks:
        raise InputError(f"data.pairs_per_batch={recipe.data.pairs_per_batch} is not divisible by {ranks} ranks")
    if args.dry_run:
        print(batch_script(profile, args.nodes, args.recipe.stem, folder))
        print(f"# ---- the recipe that train.py would get ----\n{dump_recipe(recipe)}", end="")
        return None
    ShardIndex.open(recipe.data.shards)  # what is wrong with it is better said now than after the queue
    job = submit(TrainingJob((str(args.recipe), *args.overrides)), profile, args.nodes, args.recipe.stem, folder)
    print(f"job {job.job_id}: logs in {folder}, progress in {recipe.run.folder / 'journal.jsonl'}")
    if args.wait or profile.cluster == "local":
        # A local job is a child of this process: it would not outlive it.
        codes = job.results()
        print(f"exit codes of the ranks: {' '.join(map(str, codes))}")
        return max(codes)
    return None


if __name__ == "__main__":
    run_command(main)
