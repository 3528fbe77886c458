"""The table of logical matrices: each element of a weight that Muon updates is in one of them, and they are what the model multiplies."""

import pytest
import torch

from conf.load import compose
from conf.optimizers import MUON, OPTIMIZERS
from train.optim.matrices import logical_matrices
from train.prove.recipe_values import read_values
from train.prove.reference import weight_shapes

MODEL = compose("conf=tiny").model
SHAPES = weight_shapes(read_values(MODEL))


def takes_muon(name: str, shape: tuple[int, ...]) -> bool:
    return OPTIMIZERS[MUON].choose_rule(name, len(shape)).is_whole


@pytest.mark.parametrize("by_head", [True, False])
def test_every_element_of_a_weight_is_in_one_matrix(by_head):
    for name, shape in SHAPES.items():
        if takes_muon(name, shape):
            counted = torch.zeros(shape).flatten(0, -2)
            for rows, columns in logical_matrices(name, shape, MODEL, by_head):
                counted[rows.start : rows.stop, columns.start : columns.stop] += 1
            assert counted.eq(1).all(), name


def test_what_adamw_keeps():
    kept = {name for name, shape in SHAPES.items() if len(shape) > 1 and not takes_muon(name, shape)}
    routers = {name for name in SHAPES if "router" in name}
    assert kept == {"embedding.weight", "head.weight", *routers} and routers
    assert not any(takes_muon(name, shape) for name, shape in SHAPES.items() if len(shape) == 1)


def found(name: str, by_head: bool = True) -> list[tuple[int, int]]:
    return [matrix.shape for matrix in logical_matrices(name, SHAPES[name], MODEL, by_head)]


def test_heads_keys_values_latents_gates_and_experts_stand_apart():
    heads, nope, rope, value = MODEL.heads, MODEL.nope_head_dim, MODEL.rope_head_dim, MODEL.v_head_dim
    attention = "mtp.0.block.attention"
    assert found(f"{attention}.q_up.weight") == [(nope + rope, MODEL.q_rank)] * heads
    assert found(f"{attention}.kv_up.weight") == [(nope, MODEL.kv_rank), (value, MODEL.kv_rank)] * heads
    assert found(f"{attention}.out.weight") == [(MODEL.hidden, value)] * heads
    assert found(f"{attention}.out.weight", by_head=False) == [(MODEL.hidden, heads * value)]
    assert found(f"{attention}.kv_up.weight", by_head=False) == [(heads * (nope + value), MODEL.kv_rank)]
    assert found(f"{attention}.kv_down.weight") == [(MODEL.kv_rank, MODEL.hidden), (rope, MODEL.hidden)]
    assert found(f"{attention}.q_down.weight") == [(MODEL.q_rank, MODEL.hidden)]
    experts = "layers.1.moe.experts"
    assert found(f"{experts}.w13") == [(MODEL.expert_width, MODEL.hidden)] * 2 * MODEL.experts
    assert found(f"{experts}.w2") == [(MODEL.hidden, MODEL.expert_width)] * MODEL.experts
    assert found("layers.0.ffn.w13.weight") == [(MODEL.dense_width, MODEL.hidden)] * 2
    assert found("mtp.0.projection.weight") == [(MODEL.hidden, 2 * MODEL.hidden)]


def test_queries_that_come_straight_from_the_input_are_split_too():
    assert len(logical_matrices("layers.0.attention.q.weight", (192, 256), MODEL, True)) == MODEL.heads
