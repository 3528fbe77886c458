"""The two parts of a proof's run differ in the ways in which a resumed run may differ, and the miniature has what each
branch needs."""

import pytest
import torch

from conf.load import compose
from conf.micro_batches import share_of
from conf.schema import Config
from train.optim.schedules import Schedules
from train.prove.layouts import PROOFS, layout_name, run_part, save_step
from train.prove.miniature import shrink
from train.prove.recipe_values import read_values
from train.prove.reference import turns, weight_shapes
from train.prove.samples import ProofData

RECIPES = {
    "tiny": ["conf=tiny"],
    "tiny_dp3": ["conf=tiny", "parallel.dp=3", "batch_size=18", "micro_batch_size=1"],
    "tiny_pp2_dp2": ["conf=tiny", "parallel.pp=2", "parallel.dp=2", "micro_batch_size=2"],
    "tiny_of_3_steps": ["conf=tiny", "steps=3", "checkpoint.staging_bytes=1e6"],
    "deepseek_v3": ["conf=deepseek_v3"],
    "deepseek_v3_32k": ["conf=deepseek_v3_32k"],
}


def small(name: str) -> Config:
    return PROOFS["fp32"](shrink(compose("mode=prove", "cluster.device=cpu", *RECIPES[name])).cfg)


@pytest.mark.parametrize("name", RECIPES)
def test_the_second_part_has_another_layout_batch_length_and_clip_and_the_data_go_on_elsewhere(name):
    config = small(name)
    ranks = max(2, config.parallel.world)
    first, second = (run_part(config, number, ranks) for number in (0, 1))
    assert layout_name(first.config) != layout_name(second.config)
    assert first.config.batch_size != second.config.batch_size and first.config.steps != second.config.steps
    assert (first.config.optim.clip < 1 < second.config.optim.clip) or first.config.optim.clip == 0
    saved = save_step(config)
    assert Schedules(first.config).samples[saved] != Schedules(second.config).samples[saved], "the data would not shift"
    assert 1 < first.spoilt == saved < first.last < second.last and second.spoilt is None
    assert first.config.checkpoint.every == saved, "written while the step after it goes on"


@pytest.mark.parametrize("name", RECIPES)
def test_a_validation_leaves_a_rest_in_every_part(name):
    config = small(name)
    for number in (0, 1):
        part = run_part(config, number, max(2, config.parallel.world)).config
        size, count = part.micro_batch_size * part.parallel.dp, len(ProofData.of(part).validation)
        assert count == part.log.validation_sequences and (size == 1 or count % size)


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_run_of_any_length_has_two_parts(steps):
    config = small("tiny")
    config.steps = steps
    first, second = (run_part(config, number, 2) for number in (0, 1))
    assert save_step(first.config) == save_step(second.config) == save_step(config) < first.last <= first.config.steps
    assert first.spoilt is None or 1 < first.spoilt < first.last
    assert all(share_of(second.config, second.config.batch_size, rank)[1] for rank in range(second.config.parallel.dp))


@pytest.mark.parametrize("name", ["deepseek_v3_32k"])
def test_some_pairs_lie_on_yarns_ramp(name):
    model, seq_len = (config := small(name)).model, config.seq_len
    like = torch.zeros((), dtype=torch.float64)
    plain = model.rope_theta ** (-2 * torch.arange(model.rope_head_dim // 2, dtype=torch.float64) / model.rope_head_dim)
    slowed = turns(read_values(model), seq_len, 2, like)[1] / plain
    between = (slowed > 1.001 / model.yarn.factor) & (slowed < 0.999)
    assert between.sum() >= 2 and slowed[0] == 1 and slowed[-1] == pytest.approx(1 / model.yarn.factor)


@pytest.mark.parametrize("name", ["tiny", "deepseek_v3"])
def test_no_vector_divides_the_gains_of_a_layer(name):
    config = small(name)
    first = {
        key: shape for key, shape in weight_shapes(read_values(config.model)).items() if key.startswith("layers.0.")
    }
    assert sum(shape[0] for shape in first.values() if len(shape) == 1) % 2 == 1
