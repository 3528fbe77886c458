"""An export in many pieces writes the bytes of one in a single piece."""

import pytest
import torch

from conf.schema import Model
from tests.hf.small import MODEL, export_model
from train.export import run
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise

RAGGED = Model(**MODEL | {"vocab_size": 300, "hidden": 136, "layers": 2, "dense_width": 270})
"""Several blocks of rows, the last of them not full, and several blocks of columns."""


@pytest.mark.parametrize("dtype", ["fp8", "fp32"])
def test_pieces_give_the_same_files(tmp_path, monkeypatch, dtype):
    """Pieces of 128 rows, which are one row of FP8 blocks: values and scales of each lie where they do in the whole."""
    ours = DeepSeekV3.whole(RAGGED, HighPrecision(torch.float32, build_kernels("cpu")), seq_len=24, device="meta")
    initialise(ours, 0)
    folders = {}
    for elements in (run.EXPORTED_ELEMENTS, 1000):
        monkeypatch.setattr(run, "EXPORTED_ELEMENTS", elements)
        (folder := tmp_path / str(elements)).mkdir()
        export_model(folder, RAGGED, ours, f"export.dtype={dtype}")
        folders[elements] = {file.name: file.read_bytes() for file in (folder / "out").glob("*.safetensors")}
    whole, pieces = folders.values()
    assert whole == pieces
