"""Which kind of device a plan is for."""

from conf.schema import Config


def device_kind(config: Config) -> str:
    """cpu or cuda: that of the description, or of this machine where there is none."""
    if config.hardware.name is not None:
        return "cpu" if config.hardware.device == "cpu" else "cuda"
    if config.cluster.device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.cluster.device
