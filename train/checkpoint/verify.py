"""Read checkpoints and check every byte:  python -m train.checkpoint.verify FOLDER...

FOLDER: a checkpoint, or a run, whose checkpoints are all read. Prints what is wrong; exit code 1 if anything is.
"""

import sys
from pathlib import Path

from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER, UserError
from conf.load import report
from train.checkpoint.manifest import verify


def main(folders: list[str]) -> int:
    if not folders:
        print(__doc__)
        return EXIT_USER
    code = EXIT_OK
    try:
        for folder in map(Path, folders):
            inner = folder / "checkpoints"
            for checkpoint in sorted(inner.glob("step_*")) if inner.is_dir() else [folder]:
                problems = verify(checkpoint, full=True)
                print(f"{checkpoint}: {'; '.join(problems) or 'intact'}")
                code = EXIT_CRASH if problems else code
    except UserError as error:
        return report(error)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
