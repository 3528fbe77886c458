"""A term of the loss that a recipe of a test names."""

from torch import Tensor

from train.model.deepseek import ModelOutputs


def squared_states(outputs: ModelOutputs) -> Tensor:
    """One that holds the states small."""
    return 1e-4 * outputs.hidden_BTD.float().square().mean()
