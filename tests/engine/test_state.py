"""A checkpoint carries a state from one layout to another, and the engine returns weights in the form of an export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.errors import UserError
from conf.load import compose
from tests.engine.scenario import LAYOUTS, SMALL, Played, config_of, play, policy_batch, share, worst_difference
from tests.ranks import run_ranks
from train.data.prepare_progress import silent
from train.data.tokenizer import Tokenizer, train_bpe
from train.export.run import write_export
from train.loop.open_engine import open_engine


def two_updates(played: Played) -> None:
    for _ in range(2):
        played.engine.forward_backward(
            share(played.config, policy_batch(played.config), played.rank.mesh.dp_rank), "ppo"
        )
        played.engine.update()


def save(played: Played) -> None:
    """Two updates, a checkpoint, the weights, and a third update."""
    two_updates(played)
    played.found.clear()
    path = played.engine.save(Path(played.config.runs))
    assert path.name == "step_00000002" and (path / "manifest.json").is_file()
    keep_weights(played)
    third(played)


def keep_weights(played: Played) -> None:
    for stacked in (False, True):
        for name, tensor in played.engine.weights(stacked=stacked, dtype=torch.float32):
            key = f"weight.{name}" if not stacked else f"stacked.{name}"
            played.found[key] = tensor.clone()


def third(played: Played) -> None:
    played.engine.forward_backward(share(played.config, policy_batch(played.config), played.rank.mesh.dp_rank), "gspo")
    played.update()


def load(played: Played) -> None:
    played.engine.load(Path(played.config.runs) / "step_00000002")
    assert played.engine.step == 2
    keep_weights(played)
    third(played)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    return folder, play(folder, "one", save, f"runs={folder / 'checkpoints'}")


@pytest.mark.parametrize("name", ["pp2_dp2_ep2_again", "ep2_zero3", "pp2_cp2_zbv"])
def test_a_state_goes_on_in_another_layout_with_the_same_weights(saved, name):
    folder, one = saved
    world, more = LAYOUTS[name]
    found = play(folder, name, load, f"runs={folder / 'checkpoints'}", *more, world=world)
    for key in one:
        if key.startswith(("weight", "stacked", "loads")):
            assert torch.equal(found[key], one[key]), key
    assert worst_difference(found, one) < 2e-5


def test_weights_are_those_of_an_export_and_have_the_balance_biases(saved):
    folder, one = saved
    Tokenizer(train_bpe((), 0)).save(folder)
    config = compose(
        *SMALL,
        "mode=export",
        f"export.checkpoint={folder / 'checkpoints' / 'step_00000002'}",
        f"export.to={folder / 'hf'}",
        "export.dtype=fp32",
    )
    write_export(config, silent)
    exported: dict[str, torch.Tensor] = {}
    for path in (folder / "hf").glob("*.safetensors"):
        exported |= load_file(path)
    given = {key.removeprefix("weight."): tensor for key, tensor in one.items() if key.startswith("weight.")}
    assert given.keys() == exported.keys()
    assert all(torch.equal(given[name], exported[name]) for name in exported)
    biases = [tensor for name, tensor in given.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4 and any(tensor.abs().max() > 0 for tensor in biases)
    stacked = one["stacked.model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked[3, :16], given["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(stacked[3, 16:], given["model.layers.1.mlp.experts.3.up_proj.weight"])


ADAPTER = ["adapter=lora", "adapter.rank=8", "adapter.alpha=32", "optim.bias_speed=[{value: 0}]", "init_from=none"]


def adapted(played: Played) -> None:
    """The base, then the adapter alone and added to it; alpha is 8, so that its scale is 4."""
    for name, tensor in played.engine.weights(dtype=torch.float32):
        played.found[f"before.{name}"] = tensor.clone()
    two_updates(played)
    for merged in (False, True):
        for name, tensor in played.engine.weights(merged=merged, dtype=torch.float32):
            played.found[f"{'merged' if merged else 'alone'}.{name}"] = tensor.clone()


@pytest.mark.parametrize("name", ["dp2", "ep2_zero3", "pp2_dp2_ep2_again"])
def test_an_adapter_is_handed_out_alone_or_added_once(tmp_path, name):
    world, more = LAYOUTS[name]
    one, found = (
        play(tmp_path, "one", adapted, *ADAPTER),
        play(tmp_path, "several", adapted, *ADAPTER, *more, world=world),
    )
    assert worst_difference(found, one) < 5e-3  # AdamW divides by the square roots of gradients that are nearly 0
    stem = "model.layers.1.self_attn.o_proj"
    a, b = (one[f"alone.base_model.model.{stem}.lora_{letter}.weight"] for letter in "AB")
    plain, bare = one[f"merged.{stem}.weight"], one[f"before.{stem}.weight"]
    assert b.abs().max() > 0 and torch.allclose(plain - bare, 4 * b @ a, atol=1e-6)
    assert [key for key in one if key.startswith("merged.") and key.endswith("e_score_correction_bias")]


def other_base(rank: int, folder: str) -> None:
    adapters = []
    for number in (1, 2):
        more = f"runs={folder}", "resume=never", f"seed={number}"
        base = open_engine(config_of(*more)).save(Path(folder) / f"base_{number}")
        adapters.append(open_engine(config_of(*more, *ADAPTER[:-1], f"init_from={base}")))
    path = adapters[0].save(Path(folder) / "adapter")
    adapters[0].load(path)
    with pytest.raises(UserError, match="other weights than the base of the adapter"):
        adapters[1].load(path)


def test_an_adapter_is_not_loaded_beside_another_base(tmp_path):
    run_ranks(other_base, str(tmp_path), world_size=1)
