"""Balance metrics against values worked out by hand and against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics.balance import (
    DEAD_STEPS,
    balance_record,
    dead_experts,
    load_entropy,
    max_vio,
    update_running,
)

COUNTS_LE = [[10, 10, 10, 10], [40, 0, 0, 0], [5, 15, 10, 10], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_known_values(kind):
    np.testing.assert_allclose(max_vio(kind(COUNTS_LE)), [0, 3, 0.5, 0])
    p = np.array([5, 15, 10, 10]) / 40
    expected = [1, 0, -(p * np.log(p)).sum() / np.log(4), 0]
    np.testing.assert_allclose(load_entropy(kind(COUNTS_LE)), expected, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any))
def test_bounds_and_scale(row):
    counts_LE = np.array([row])
    assert 0 <= max_vio(counts_LE)[0] <= len(row) - 1 + 1e-9
    assert -1e-12 <= load_entropy(counts_LE)[0] <= 1 + 1e-12
    np.testing.assert_allclose(max_vio(counts_LE * 7), max_vio(counts_LE), atol=1e-12)


def test_running_load_averages_the_noise_of_batches_out():
    generator = np.random.default_rng(0)
    running, batch = None, []
    for _ in range(300):
        counts_LE = generator.multinomial(256, np.full(8, 1 / 8), size=2)
        running = update_running(running, counts_LE)
        batch.append(max_vio(counts_LE).mean())
    assert np.mean(batch) > 0.2
    assert max_vio(running.load_LE).mean() < 0.05


def test_running_load_is_the_sum_with_exponential_forgetting():
    first, second = np.array([[4.0, 0.0]]), np.array([[1.0, 3.0]])
    running = update_running(update_running(None, first), second)
    np.testing.assert_allclose(running.load_LE, 0.99 * first + second)
    assert running.steps == 2


def test_an_expert_is_dead_after_a_number_of_empty_steps_and_revives_at_once():
    full, starved = np.array([[1, 1, 1]]), np.array([[3, 0, 0]])
    running = update_running(None, full)
    for _ in range(DEAD_STEPS - 1):
        running = update_running(running, starved)
    assert dead_experts(running).tolist() == [0]
    running = update_running(running, starved)
    assert dead_experts(running).tolist() == [2]
    assert dead_experts(update_running(running, np.array([[2, 1, 0]]))).tolist() == [1]


def test_record_has_means_over_layers_and_detail_per_layer():
    layers, bias_LE = ["layers.1", "mtp.0"], torch.tensor([[0.0, 0.1, -0.2, 0.0], [0.3, 0.0, 0.0, 0.0]])
    running = update_running(None, COUNTS_LE[:2])
    record = balance_record(layers, torch.tensor(COUNTS_LE[:2]), bias_LE, running)
    assert record["max_vio"] == 1.5 and record["layer_max_vio"] == {"layers.1": 0.0, "mtp.0": 3.0}
    assert record["dead_experts"] == 3 and record["layer_dead_experts"] == {"layers.1": 0, "mtp.0": 3}
    assert record["load"] == {"layers.1": [10] * 4, "mtp.0": [40, 0, 0, 0]}
    assert record["bias_min"] == pytest.approx(-0.2) and record["bias_max"] == pytest.approx(0.3)
    assert record["max_vio_running"] == 1.5, "the mean of 0 and 3"
    assert balance_record([], [], [], running) == {}
