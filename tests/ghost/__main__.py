"""python -m tests.ghost ARGUMENTS...: this Python with these arguments, on the ghost."""

import os
import sys

from tests.ghost.build import NoCudaBuild, ghost_environment

try:
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], ghost_environment())
except NoCudaBuild as error:
    sys.exit(f"error: {error}")
