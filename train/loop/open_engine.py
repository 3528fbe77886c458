"""Opens an engine in this process, for torchrun and for sessions."""

from contextlib import nullcontext
from pathlib import Path

from cluster.interfaces import NAMES
from cluster.place import Place, given_place
from conf.errors import UserError
from conf.schema import Config
from parallel.exchange import from_rank_0
from train.checkpoint.run_folder import find_checkpoint
from train.hf.folder import Folder, is_hf_folder, match, open_model
from train.kernels.choice import choose_kernels
from train.loop.layout_check import check_layout
from train.loop.live_model import LiveModel
from train.loop.start import start_from
from train.loop.state import RunState
from train.loop.training_engine import Engine
from train.parallelize import parallelize
from train.program import keep_environment
from train.rank import set_up_rank


def open_engine(config: Config, place: Place | None = None) -> Engine:
    """Returns the engine of this rank. Collective over all ranks. Raises UserError.

    torchrun's variables RANK and WORLD_SIZE determine the rank. Without them, the process is the only rank. The weights
    come from `resume` if it names a checkpoint, else from `init_from`, else from the seed. All engines of a
    process must have the same number of ranks.
    """
    place = place or given_place() or Place()
    if place.world != config.parallel.world:
        rule = f"must equal the number of ranks of the layout, {config.parallel.world}"
        raise UserError("WORLD_SIZE", place.world, rule, "start as many processes, or change parallel.*")
    check_layout(config)
    # Restore variables that select network interfaces: a later session may need other interfaces.
    with keep_environment(NAMES) if place.world == 1 else nullcontext():
        rank = set_up_rank(config, place)
    kernels, _ = choose_kernels(config, rank.device)
    resumes, source = config.resume not in ("auto", "never"), config.init_from
    parts = parallelize(config, rank.mesh, rank.device, kernels, restored=resumes or source is not None)
    state = RunState(config, rank.mesh, parts)
    engine = Engine(config, parts, rank, LiveModel(config, rank, parts.chunks, state))
    if source is not None and (config.adapter.on or not resumes):
        start_from(config, _weights_of(config, source), state)
    if resumes:
        engine.load(Path(from_rank_0(lambda: str(find_checkpoint(config, config.resume, "resume")))))
    return engine


def _weights_of(config: Config, source: str) -> Folder | Path:
    """Opens the Hugging Face folder or the checkpoint that init_from names."""
    path = Path(source).expanduser()
    if not is_hf_folder(path):
        return find_checkpoint(config, str(path), "init_from")
    folder, _, _ = open_model(path, text_only=config.text_only)
    match(folder, config.model)
    return folder
