"""What the fork server of tests/ranks.py has imported before a rank starts: all that a trainer's rank needs, 2500 modules,
which take each rank 2.5 s of a core otherwise.

Not train.worker itself: it sets how this process's memory is managed, which tests of memory must find as it was.
"""

from parallel.zero.engine import import_deepspeed

import_deepspeed(on_cuda=False)
