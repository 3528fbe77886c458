"""A file that is written in pieces through few buffers equals the file that is written at once."""

import torch

from cluster.run_files import data_name
from conf.thresholds import THRESHOLDS
from parallel.shard import Shard
from train.checkpoint.staging import StagingBuffers


def test_pieces_make_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(THRESHOLDS, "staging_bytes", 1000)
    torch.manual_seed(0)
    sizes = {"master.a": 700, "master.b": 3, "exp_avg.a": 1999, "exp_avg.b": 512}
    shards = {
        name: Shard(torch.randn(size).to(torch.float32 if "master" in name else torch.bfloat16), 0, (size,))
        for name, size in sizes.items()
    }
    files, indexes = [], []
    for most in (0, 1, 2500, 10**9):
        folder = tmp_path / str(most)
        folder.mkdir()
        buffers = StagingBuffers(False, most)
        buffers.copy(shards)
        assert buffers.in_pieces == (0 < most < 10**9)
        assert sum(one.numel() for one in buffers.segments) == (
            buffers.layout.data_bytes if most in (0, 10**9) else max(most, 1000)
        )
        indexes += [buffers.write(folder, 0), buffers.write(folder, 0)]  # again, as after an error of the disk
        files.append((folder / data_name(0)).read_bytes())
    assert int.from_bytes(files[0][:8], "little") % 8 == 0, "the data behind the header are aligned"
    assert len(set(files)) == 1 and all(index == indexes[0] for index in indexes)
