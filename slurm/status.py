"""How runs stand: job, state, steps, restarts, documents a second, time left, and how long the journal has been silent.

Reads the run folders, and asks squeue and sacct where there are such. Without Slurm the state is what the journal says
last: `started`, `stopped`, `done` or `gave up`.
"""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.run_status import run_status, status_table


def main() -> None:
    parser = argument_parser(__doc__, "python slurm/status.py runs/*")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    args = parser.parse_args()
    print(status_table([run_status(run) for run in args.runs]))


if __name__ == "__main__":
    run_command(main)
