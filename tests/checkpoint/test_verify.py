"""The command that reads checkpoints to the last byte."""

import random

from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER
from tests.checkpoint.world import checkpointers, random_tensors, save, spread
from train.checkpoint.verify import main


def test_an_intact_run_a_flipped_bit_and_a_wrong_path(tmp_path, capsys):
    rng = random.Random(1)
    world = checkpointers(tmp_path / "checkpoints", 2)
    for step in (1, 2):
        save(world, step, spread(rng, random_tensors(rng, 6), 2))
    assert main([str(tmp_path)]) == EXIT_OK and capsys.readouterr().out.count(": intact") == 2
    victim = max((tmp_path / "checkpoints" / "step_00000002").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    body = bytearray(victim.read_bytes())
    body[-1] ^= 1
    victim.write_bytes(body)
    assert main([str(tmp_path)]) == EXIT_CRASH and victim.name in capsys.readouterr().out
    assert main([str(tmp_path / "checkpoints" / "step_00000001")]) == EXIT_OK
    assert main([str(tmp_path / "nowhere")]) == EXIT_USER and main([]) == EXIT_USER


def test_a_run_without_a_checkpoint_is_not_called_sound(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path)]) == EXIT_USER and "without a checkpoint" in capsys.readouterr().err
    assert main(["--help"]) == EXIT_OK and "FOLDER" in capsys.readouterr().out
