"""What the fork server of tests/ranks.py has imported before a rank starts: all that a trainer's rank needs, 3200 modules,
which take each rank 4 s of a core otherwise; and what a process makes once, of the schema and for its first report, 1 s of a core.

train.worker itself runs in every rank: it sets how this process's memory is managed, which tests of memory must find as it
was. Here it is imported for what it imports, without that setting, and forgotten.
"""

import gc
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import train
from conf.load import compose
from parallel.zero.deepspeed_patches import import_deepspeed
from tests.composing import keep_groups
from train.show.report import write_report

with mock.patch("train.kernels.cpu.processor.tune_cpu"):
    import train.worker
del sys.modules["train.worker"], sys.modules["train.kernels.cpu.tuned"], train.worker
import_deepspeed(on_cuda=False)
keep_groups()
for words in ([], ["precision=fp32"], ["precision=bf16"], ["precision=fp8"]):
    compose(*words)
with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(Path(__file__).parent / "old_runs" / "v0_1_0" / "runs" / "run", folder, dirs_exist_ok=True)
    write_report(Path(folder))
gc.collect()
gc.freeze()  # else Python's collector would touch the pages of all this in every rank, and so copy them
