"""A step of a custom loop, on a whole model and any torch optimizer: implements `train.train_step`."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.schema import Config
from train.loop.training_engine import set_weights
from train.model.deepseek import DeepSeekV3
from train.model.router import update_bias
from train.optim.schedules import Schedules


def run_step(model: DeepSeekV3, optimizer: Optimizer, tokens_BS: Tensor, config: Config, step: int) -> dict[str, float]:
    """See train/api.py."""
    plan, parts = Schedules(config).plan(step), tokens_BS.split(config.micro_batch_size)
    routers = [*model.routers().values()]
    set_weights(
        [model], plan, *(weight / len(parts) for weight in (config.optim.balance_loss, config.optim.index_loss))
    )
    model.warms_indexers = config.optim.index_warmup
    model.losses.clear()
    for counting in (*routers, *model.indexers()):
        counting.clear()
    optimizer.zero_grad()
    for part in parts:
        (model(part) / len(parts)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or torch.inf)
    main, *mtp, extra = model.losses.means().tolist()
    if norm.isfinite() and model.losses.means()[0].isfinite():
        for group in optimizer.param_groups:
            group["lr"] = plan.lr
        optimizer.step()
        for router in routers:
            update_bias(router.bias_E, router.load_E, plan.bias_speed)
    return {
        "main_loss": main,
        "mtp_loss": sum(mtp) / max(1, len(mtp)),
        "extra_loss": extra,
        "balance_loss": sum(router.balance_loss.item() for router in routers),
        "index_loss": sum(float(indexer.loss) for indexer in model.indexers()),
        "grad_norm": norm.item(),
        "lr": plan.lr,
    }
