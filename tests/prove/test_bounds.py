"""How far a proof lets two computations be apart: a wider bound would hide bugs, and no proof would say so."""

import pytest

from conf.load import compose
from conf.schema import Config
from tests.small import SMALL
from train.prove.bounds import MOST, averaged, chosen, computed, is_low, is_rounded

PRODUCTS, TERMS = 82, 320
"""Of tests/small.py: 8 products of each of 4 layers and an MTP block, and the head, there and back; the longest sum is over the vocabulary."""
BF16, E4M3 = "precision=bf16", "precision=fp8"
WIRE = ["parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"]


def config_of(*words: str) -> Config:
    return compose(*SMALL, "data.path=none", *words)


@pytest.mark.parametrize(
    ("proof", "words", "expected"),
    [
        ("exact", [BF16], 1e-10),
        ("fp32", [BF16], 8 * 2**-24 * (PRODUCTS * TERMS) ** 0.5),
        ("recipe", [], 8 * 2**-24 * (PRODUCTS * TERMS) ** 0.5),
        ("recipe", [BF16], 2 * 2**-8 * PRODUCTS**0.5),
        ("tiles", [E4M3], MOST),
        ("recipe", [BF16, *WIRE], MOST),
        ("recipe", [E4M3, "model.layers=1", "model.mtp_depth=0", "model.dense_layers=1"], 2 * 2**-4 * 18**0.5),
    ],
)
def test_what_is_computed_may_be_off_by_what_its_products_round(proof, words, expected):
    config = config_of(*words)
    bound = computed(proof, config)
    assert bound.value == pytest.approx(expected) and bound.value <= MOST < 1
    if proof != "exact":
        assert chosen(proof, config).value == pytest.approx(expected / 4), "the slope of a sigmoid"


def test_a_long_batch_has_longer_sums_than_a_vocabulary():
    longer = computed("fp32", config_of("seq_len=160")).value / computed("fp32", config_of()).value
    assert longer == pytest.approx((8 * 160 / TERMS) ** 0.5)


def test_choices_are_the_same_in_fp64_and_of_a_softmax_twice_as_loose():
    config = config_of(BF16, "model.scores=softmax", "optim.bias_speed=[{value: 0}]")
    assert chosen("exact", config).value == 0
    assert chosen("recipe", config).value == pytest.approx(computed("recipe", config).value / 2)


def test_the_mean_of_rounded_losses_is_off_by_less():
    """Of 6 sequences of 24 tokens. In fp32 nothing is said of roundings of different tokens."""
    config = config_of(BF16)
    assert averaged("recipe", config, 6).value == pytest.approx(computed("recipe", config).value * 2 / 144**0.5)
    assert averaged("fp32", config, 6) == computed("fp32", config)


def test_which_passes_are_rounded_and_low():
    for words, rounded, low in (([], False, False), ([BF16], True, True), ([E4M3], True, True), (WIRE, True, False)):
        config = config_of(*words)
        for proof in ("exact", "fp32", "recipe", "tiles"):
            of_recipe = proof in ("recipe", "tiles")
            assert is_rounded(proof, config) == (rounded and of_recipe)
            assert is_low(proof, config) == (low and of_recipe)
