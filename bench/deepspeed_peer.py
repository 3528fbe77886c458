"""DeepSpeed's AutoEP as a peer on CPU: transformers' DeepSeek-V3 with its expert layers replaced, under ZeRO.

AutoEP has a preset for this model (deepseek_v3). With bf16, ZeRO's shards hold fp32 copies of the weights and gradients
are bf16, which are DeepSpeed's defaults; the optimizer is torch's fused AdamW with fp32 moments. Under a pipeline
(PipelineModule, its own 1F1B), modules lack the names by which AutoEP finds a layer's experts, so it gets a pattern;
layers are split by parameters.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.zero.deepspeed_patches import import_deepspeed

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM


def build_step(
    model: "DeepseekV3ForCausalLM", tokens_BS: Tensor, *, pp: int, ep: int, zero: int, micro_batches: int
) -> Callable[[], object]:
    """Forward, backward, clipping to norm 1 and update on these tokens, on this rank of the default process group."""
    deepspeed = import_deepspeed(on_cuda=False)
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": len(tokens_BS) // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero},
        "expert_parallel": {"enabled": True, "autoep_size": ep, "preset_model": "deepseek_v3"},
    }
    if pp == 1:
        engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer, config=config)
        tokens_BT = tokens_BS[:, :-1].contiguous()

        def step() -> None:
            engine.backward(engine(input_ids=tokens_BT, labels=tokens_BT).loss)
            engine.step()

        return step
    config["expert_parallel"]["moe_layer_pattern"] = r"\d+\.layer\.mlp"
    pipeline = _pipeline(model, pp)
    engine, *_ = deepspeed.initialize(
        model=pipeline, optimizer=_optimizer, model_parameters=list(pipeline.parameters()), config=config
    )
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens_BS.chunk(micro_batches)]
    return lambda: engine.train_batch(data_iter=iter(batches))


def _optimizer(parameters) -> torch.optim.Optimizer:
    from deepspeed.moe.utils import configure_moe_param_groups

    groups = configure_moe_param_groups(list(parameters))
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class _Layer(nn.Module):
    """A layer of transformers' model whose only input is the activations, as PipelineModule requires."""

    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, x_BTH: Tensor) -> Tensor:
        positions_1T = torch.arange(x_BTH.shape[1])[None]
        return self.layer(x_BTH, position_embeddings=self.rotary(x_BTH, positions_1T), position_ids=positions_1T)


def _pipeline(model: "DeepseekV3ForCausalLM", stages: int):
    from deepspeed.pipe import PipelineModule

    body = model.model
    layers = [_Layer(layer, body.rotary_emb) for layer in body.layers]
    pipeline = PipelineModule(
        layers=[body.embed_tokens, *layers, body.norm, model.lm_head],
        num_stages=stages,
        loss_fn=lambda logits_BTV, targets_BT: F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten()),
        partition_method="parameters",
    )
    pipeline.config = model.config  # AutoEP reads the sizes of the experts from this attribute
    return pipeline
