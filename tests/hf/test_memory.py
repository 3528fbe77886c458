"""A model with all 61 layers, 256 experts and the MTP module of DeepSeek-V3, but small width, is never completely in
memory."""

import pytest

from bench.hf_memory import main


@pytest.mark.slow
def test_import_and_export_stream(capsys):
    """Import adds a rank's share and some rows; export a few million elements, whatever the model.

    150 MB of room on top: 32 MB of rows in fp32 and their copies in conversion, 45,000 names, the allocator's slack. The
    export's 64 MB of elements have a few copies while they change type.
    """
    found = main(["--expert-width=32", "--ranks=4", "--dtype=bf16"])
    model = found["model_fp32"]
    assert model > 700e6 and found["files"] > 3
    assert found["share"] < model / 4 * 1.01
    assert found["import_read"] < found["folder"] * 0.3  # a quarter, whole rows, and all scales of those tensors
    assert found["import_added"] < found["share"] + 150e6 < model * 0.5
    assert found["export_added"] < 500e6 < model
    assert found["different"] == []
