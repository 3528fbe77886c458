"""Write a layout as a file of the group `parallel`, to be used with parallel=NAME."""

from pathlib import Path

from conf.errors import UserError
from conf.schema import ROOT, Config
from train.plan.changes import overrides


def write_parallel(config: Config, name: str, base: Config, folder: Path | None = None) -> Path:
    """Write conf/parallel/<name>.yaml; returns its path. Raises UserError where the name is taken by another file.

    What is not of the group (micro-batch, recomputation) stands in a comment, as the arguments to give with it.
    """
    path = (folder or ROOT / "conf" / "parallel") / f"{name}.yaml"
    rest = [part for part in overrides(config, base) if not part.startswith("parallel.")]
    head = f"# Found by plan.search for conf={base.name}, hardware={config.hardware.name}; use with: parallel={name}"
    lines = [" ".join([head, *rest])]
    for field, value in vars(config.parallel).items():
        lines.append(f"{field}: {str(value).lower() if isinstance(value, bool) else value}")
    if path.exists() and not path.read_text().startswith("# Found by plan.search"):
        raise UserError("plan.write", name, f"{path} is there and was not written by a search", "choose another name")
    path.write_text("\n".join(lines) + "\n")
    return path
