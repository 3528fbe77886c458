"""What stage 3 gathers, by hand. Against DeepSpeed itself: the peaks of test_memory.py."""

from train.plan.gather import Held, Shared, held_weights


def _dense(elements: int) -> Shared:
    return Shared(elements, "dense", 2)


def test_weights_that_come_alone_take_their_size_and_go_after_their_unit():
    units = [[_dense(10)], [_dense(10)], [_dense(11)]]
    assert held_weights(units, [(0, True), (1, True), (2, True)], 10) == [Held(20, 20), Held(22, 22), Held(12, 12)]


def test_weights_that_come_together_are_copied_out_of_a_buffer():
    """Both come for the first unit, so the buffer is gone when it works; the third, shared by nobody, takes nothing."""
    units = [[_dense(6), _dense(3), Shared(50, "experts", 1)]]
    assert held_weights(units, [(0, True)], 59) == [Held(9 + 10, 9)]


def test_a_buffer_stays_until_all_units_of_it_have_waited():
    units = [[_dense(20)], [_dense(8)], [_dense(8)]]
    first, second, third = held_weights(units, [(0, True), (1, True), (2, True)], 20)
    assert first == Held(20 + 16, 20 + 16), "the two others are on their way in one buffer"
    assert second == Held(16 + 16, 16 + 16) and third == Held(8 + 16, 8)


def test_a_weight_that_is_counted_on_again_stays():
    """The head's backward follows its forward at once."""
    units = [[_dense(10)], [_dense(10)]]
    visits = [(0, True), (1, True), (1, True), (0, True)]
    assert [held.working for held in held_weights(units, visits, 10)] == [20, 20, 20, 10]
