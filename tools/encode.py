"""Documents -> vectors, with the facts of their documents, in a folder. Stopped anywhere, the same command goes on.

Under torchrun, deepspeed or srun all ranks encode together; with --step and --share so do the jobs of an array.
"""

from pathlib import Path

import torch

from hmde_dist import topology
from hmde_dist.command import InputError, argument_parser, run_command
from hmde_dist.corpus import steps
from hmde_dist.corpus.readers import add_documents_argument
from hmde_dist.evaluation.encode import OUTPUTS, STEPS, encode_on_ranks, encode_to_folder
from hmde_dist.stream.vectors import STORED_AS

PATIENCE_MINUTES = 24 * 60  # that a rank with little to do waits for the others


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/encode.py --model build/model --documents build/documents/test.jsonl.gz --out build/vectors\n"
        "  torchrun --nproc_per_node 8 tools/encode.py --model build/model --documents corpus.jsonl.gz --out build/vectors",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL_DIR", help="an exported model")
    add_documents_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="VECTORS_DIR", help="folder to create")
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        default=OUTPUTS[0],
        help="document vectors, means of sentence vectors, sentence vectors, or their states behind the document "
        "encoder (%(default)s)",
    )
    parser.add_argument(
        "--precision", choices=tuple(STORED_AS), default="fp16", help="of the vectors on disk (%(default)s)"
    )
    parser.add_argument("--local_rank", help="set by the deepspeed launcher; not used")
    steps.add_arguments(parser, STEPS, threads=True)
    args = parser.parse_args()
    what = (args.model, args.documents, args.output, args.precision, args.out)
    if topology.has_ranks():
        if args.step or args.share != (0, 1) or args.workers:
            raise InputError("--step, --share and --workers are for jobs without a launcher: ranks share by themselves")
        world = topology.join(PATIENCE_MINUTES)
        try:
            manifest = encode_on_ranks(world, *what)
        finally:
            topology.leave()
        if not world.is_first:
            return
    else:
        if args.workers:
            torch.set_num_threads(args.workers)
        try:
            manifest = encode_to_folder(*what, args.step, args.share)
        except steps.ShareDone:
            return
    print(
        f"{manifest['rows']} vectors of {manifest['documents']} documents in {len(manifest['languages'])} languages, width "
        f"{manifest['width']}, {manifest['precision']}; {manifest['sentences_left_out']} sentences beyond the model's limit "
        f"left out, {manifest['without_tokens']} documents without tokens; written to {args.out}"
    )


if __name__ == "__main__":
    run_command(main, patience=3.0 * (topology.claimed_rank() > 0))
