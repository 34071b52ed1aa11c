"""Submit a training run to Slurm with submitit, or run the same job on this machine with `--profile local`.

The job saves, requeues itself and goes on when its time limit comes, when it is preempted and when a node fails.
With --array N the command behind `--` (tools/build_documents.py wikipedia, build_shards.py or encode.py) is spread over the
cluster instead: each of its steps becomes an array of N jobs that waits for the step before it.
"""

import sys
from itertools import pairwise
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.corpus import shard_build, wikipedia
from hmde_dist.evaluation import encode
from hmde_dist.recipe import dump_recipe, load_recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.submission import (
    Profile,
    batch_script,
    load_profile,
    profile_path,
    step_scripts,
    submit,
    submit_steps,
    wait,
)


def main() -> int | None:
    parser = argument_parser(
        __doc__,
        "python slurm/launch.py recipes/demo.yaml --profile gpu --nodes 2 --dry-run run.steps=1000\n"
        "  python slurm/launch.py --profile cpu --array 32 -- tools/build_documents.py wikipedia --dumps /data/dumps "
        "--languages en,de,ja --out /data/documents",
    )
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--profile", required=True, metavar="NAME", help="of slurm/profiles/, or a YAML file")
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument(
        "--array", type=positive, metavar="N", help="jobs that share each step of the command behind --"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and the recipe; submit nothing")
    parser.add_argument("--wait", action="store_true", help="stay until the job ends, with its exit code")
    before, command = split_command(sys.argv[1:])
    args = parser.parse_intermixed_args(before)
    profile = load_profile(profile_path(args.profile))
    if command or args.array:
        if args.recipe or not command or not args.array:
            raise InputError("give RECIPE, or --array N -- COMMAND")
        return submit_build(command, profile, args.array, args.dry_run)
    if not args.recipe:
        raise InputError("give RECIPE, or --array N -- COMMAND")
    recipe = load_recipe(args.recipe, args.overrides)
    folder = recipe.run.folder / "jobs"
    ranks = args.nodes * profile.tasks_per_node
    if recipe.data.pairs_per_batch % ranks:
        raise InputError(f"data.pairs_per_batch={recipe.data.pairs_per_batch} is not divisible by {ranks} ranks")
    if args.dry_run:
        print(batch_script(profile, args.nodes, args.recipe.stem, folder))
        print(f"# ---- the recipe that train.py would get ----\n{dump_recipe(recipe)}", end="")
        return None
    # What is wrong with the shards is better said now than after the queue.
    for source in recipe.data.sources:
        if "://" not in source.shards:
            ShardIndex.open(source.shards)
    job = submit(dump_recipe(recipe).encode(), profile, args.nodes, args.recipe.stem, folder)
    print(f"job {job.job_id}: logs in {folder}; python slurm/status.py {recipe.run.folder}", flush=True)
    # A local job is a child of this process: it would not outlive it.
    return wait(job, folder) if args.wait or profile.cluster == "local" else None


def split_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind `--`."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def submit_build(command: list[str], profile: Profile, shares: int, dry_run: bool) -> None:
    program = Path(command[0]).name
    chains = {"build_documents.py": wikipedia.STEPS, "build_shards.py": shard_build.STEPS, "encode.py": encode.STEPS}
    steps, gpus = chains.get(program), int(program == "encode.py")
    if steps is None or (program == "build_documents.py" and command[1:2] != ["wikipedia"]):
        raise InputError(
            f"{' '.join(command[:2])}: only tools/build_documents.py wikipedia, build_shards.py and encode.py have steps"
        )
    if not Path(command[0]).is_file():
        raise InputError(f"{command[0]}: no such file here")
    outs = [value for name, value in pairwise(command) if name == "--out"]
    if len(outs) != 1:
        raise InputError("the command needs one --out DIR")
    taken = [name for name in command if name.split("=")[0] in ("--workers", "--step", "--share", "--plan")]
    if taken:
        raise InputError(f"{', '.join(taken)}: set by the jobs themselves; leave it out")
    if profile.cluster == "local":
        raise InputError("--profile local has no arrays: run the command itself, it uses every core")
    out = Path(outs[0]).resolve()
    folder = out.with_name(out.name + ".jobs")
    if dry_run:
        print(step_scripts(steps, profile, shares, folder, gpus))
        return
    for step, job in submit_steps(command, steps, profile, shares, folder, gpus).items():
        print(f"{step:<10} job {job}: logs in {folder / step}")


if __name__ == "__main__":
    run_command(main)
