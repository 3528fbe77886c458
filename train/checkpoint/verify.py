"""Reads checkpoints and checks every byte:  python -m train.checkpoint.verify FOLDER...

FOLDER: a checkpoint, or a run folder, whose checkpoints are all read. The command prints the problems of each
checkpoint, or `intact`. The exit code is 1 if there are problems.
"""

import sys
from pathlib import Path

from cluster.run_files import STEP_FOLDERS
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER, UserError
from conf.load import reported
from conf.words import one_line, say
from train.checkpoint.manifest import verify


@reported
def main(folders: list[str]) -> int:
    if not folders or {"-h", "--help"} & set(folders):
        say(__doc__)
        return EXIT_OK if folders else EXIT_USER
    code = EXIT_OK
    for folder in map(Path, folders):
        for checkpoint in _checkpoints(folder):
            problems = verify(checkpoint, full=True)
            say(f"{one_line(checkpoint)}: {'; '.join(problems) or 'intact'}")
            code = EXIT_CRASH if problems else code
    return code


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, or the folder itself. Raises UserError."""
    inner = folder / "checkpoints"
    if not inner.is_dir():
        return [folder]
    found = sorted(inner.glob(STEP_FOLDERS))
    if not found:
        raise UserError("FOLDER", folder, "is a run without a checkpoint", "give a run with a checkpoint")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
