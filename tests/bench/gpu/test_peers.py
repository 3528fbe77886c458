"""Peers that are not installed are named. The sides of a step are compared by their medians."""

import importlib.util

import pytest
import torch

from bench.gpu import peers
from bench.gpu.line import NotTried
from bench.gpu.machine import Machine

MACHINE = Machine(torch.device("cpu"))


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "PEERS", tmp_path)


def test_a_dry_check_installs_nothing_and_names_what_is_missing(nothing_installed):
    for name in ("torchtitan", "transformers"):
        with pytest.raises(NotTried, match=f"{name} is not installed"):
            peers.interpreter(MACHINE, name)
    with pytest.raises(NotTried, match="TransformerEngine is not installed"):
        peers.transformer_engine(MACHINE)


def test_a_peer_that_cannot_be_installed_is_not_tried(nothing_installed, monkeypatch):
    def fails(folder):
        raise RuntimeError("no network")

    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr("bench.torchtitan_peer.environment", fails)
    with pytest.raises(NotTried, match="cannot be installed: no network"):
        peers.interpreter(MACHINE, "torchtitan")


def test_a_side_is_told_by_the_median_of_its_rounds_and_ends(monkeypatch):
    ended = []

    class Side:
        first_step = 2.0

        def __init__(self, command, tokens, threads):
            assert command[2:5] == ["bench.gpu.peers", "transformers", "cpu"] and tokens == 64
            self.rates = iter([(30.0, 1.0), (10.0, 1.0), (20.0, 1.0)])

        def turn(self, seconds):
            return next(self.rates)

        def peak_memory(self):
            return 2**30

        def kill(self):
            ended.append(True)

    monkeypatch.setattr(peers, "Side", Side)
    figures = peers.step(MACHINE, "transformers").figures
    assert (figures["tokens/s"], figures["slowest"], figures["fastest"]) == (20.0, 10.0, 30.0)
    assert figures["peak (GiB)"] == 1.0 and figures["TFLOP/s"] > 0 and ended
