"""What the fork server of tests/ranks.py has imported before a rank starts: all that a trainer's rank needs, 3200 modules,
which take each rank 4 s of a core otherwise.

train.worker itself runs in every rank: it sets how this process's memory is managed, which tests of memory must find as it
was. Here it is imported for what it imports, without that setting, and forgotten.
"""

import sys
from unittest import mock

import plotly.graph_objects  # noqa: F401  the report's

import train
from parallel.zero.engine import import_deepspeed

with mock.patch("train.kernels.cpu.processor.tune_cpu"):
    import train.worker
del sys.modules["train.worker"], sys.modules["train.kernels.cpu.tuned"], train.worker
import_deepspeed(on_cuda=False)
