"""torchtitan's DeepSeek-V3 as a peer on CPU: a separate environment from the package registry, and a training step.

The environment adds torchtitan and its requirements to this environment's torch, so that both sides run the same torch.
Its Trainer requires CUDA, so the step is written here around its model. Two changes let the step run on CPU:

    attention   flex attention has no backward on CPU; torchtitan's own ScaledDotProductAttention replaces it
    precision   with bf16, whole weights are bf16 (torchtitan's fp32 weights with casts in every step would cost more)

Over several ranks (`build_ranks_step`) its own functions spread the model: parallelize_deepseekv3 (FSDP2 with expert
parallelism) and pipeline_llm with 1F1B. Weights follow its training defaults: fp32 shards, gathered and used in bf16
(or in fp32), gradients reduced in fp32. It is not designed for CPUs, and expects a newer torch than 2.13. To run here:

    device      the detected device type is set to cpu (it assumes cuda if torch finds no accelerator)
    gloo        FSDP2 sums gradients with SUM (set_force_sum_reduction_for_comms): gloo has no PREMUL_SUM
    layout      spmd_backend is partial_dtensor: FSDP2 of torch 2.13 lacks the annotations of its default, spmd_types
    pipeline    schedules get a whole batch and cut it, because torch 2.13's do not take its Trainer's micro-batches

Optimizer: torch's fused AdamW, torchtitan's own default.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from conf.schema import Model

if TYPE_CHECKING:  # a process that only needs the environment does not import torch
    import torch
    from torch import Tensor

PACKAGES = [
    "torchtitan==0.3.0", "spmd_types==0.2.3", "torchdata==0.11.0", "torch_checkpointing==0.1.1", "tyro>=1,<2",
    "triton>=3.6,<4", "einops", "tensorboard", "typeguard", "docstring_parser", "shtab",
]  # fmt: skip
"""Packages that are installed without their dependencies. torch and the other dependencies are already installed."""


def environment(folder: Path) -> Path:
    """Interpreter of the environment in this folder. The first use creates the environment. Raises RuntimeError if this
    fails."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    # a CUDA build of torch installs the right version of triton
    packages = [one for one in PACKAGES if not (one.startswith("triton") and importlib.util.find_spec("triton"))]
    if done.exists() and done.read_text() == "\n".join(packages):
        return python
    print(f"installing {PACKAGES[0]} into {folder}", file=sys.stderr)
    _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder))
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages)
    done.write_text("\n".join(packages))
    return python


def _run(*words: str) -> None:
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr or result.stdout).strip().splitlines()[-1])


def build_step(
    model: Model, tokens_BS: "Tensor", dtype: "torch.dtype", mtp: bool, compiled: bool = False
) -> Callable[[], None]:
    """Forward, backward, clipping to norm 1 and update on these tokens and their device. Only in `environment`.

    compiled: every block by torch.compile, as torchtitan does on a GPU.
    """
    import torch
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.deepseek_v3 import MTPLoss

    device = tokens_BS.device
    with device:
        peer = _config(model, mtp).build()
        peer.init_states(buffer_device=device)
    _cast(peer, dtype)
    for layer in peer.layers.values() if compiled else ():
        layer.compile()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs_BT, targets_BT = tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()
    positions_BT = torch.arange(inputs_BT.shape[1], device=device).expand_as(inputs_BT)
    mtp_loss = MTPLoss(MTPLoss.Config()) if mtp else None

    def step() -> None:
        out = peer(inputs_BT, positions_BT)
        if mtp_loss is None:
            loss = cross_entropy_loss(out, targets_BT)
        else:
            loss, _ = mtp_loss(out, targets_BT, positions=positions_BT)
        (loss / targets_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_ranks_step(
    model: Model, tokens_BS: "Tensor", dtype: "torch.dtype", *, pp: int, ep: int, micro_batches: int
) -> Callable[[], None]:
    """The step of `build_step`, over the ranks of the default process group, with the tokens of this data-parallel
    rank."""
    import torch

    torch._utils._get_available_device_type = lambda: "cpu"  # read when torchtitan is imported
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.utils import clip_grad_norm_, get_spmd_context

    loss_of = CrossEntropyLoss.Config().build(compile_config=CompileConfig())
    parts, dims, pipeline = _spread(model, tokens_BS, dtype, pp, ep, micro_batches, loss_of)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    context = get_spmd_context(parallel_dims=dims, spmd_typechecking=False)
    inputs_BT, targets_BT = tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()
    positions_BT = torch.arange(inputs_BT.shape[1]).repeat(len(inputs_BT), 1)
    all_tokens = torch.tensor(targets_BT.numel() * dims.dp_shard)

    def forward_backward() -> None:
        loss, _ = loss_of(parts[0](inputs_BT, positions=positions_BT), targets_BT, all_tokens)
        loss.backward()

    def forward_backward_pipeline() -> None:
        stage = pipeline._stage
        pipeline.step(
            *((inputs_BT,) if stage.is_first else ()),
            target=targets_BT if stage.is_last else None,
            return_outputs=False,
            loss_kwargs={"global_valid_tokens": all_tokens},
            positions=positions_BT,
        )

    def step() -> None:
        with context():
            (forward_backward if pipeline is None else forward_backward_pipeline)()
        pp_mesh = dims.get_optional_mesh("pp")
        clip_grad_norm_(parameters, 1.0, foreach=True, pp_mesh=pp_mesh, ep_enabled=dims.ep_enabled)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _spread(
    model: Model, tokens_BS: "Tensor", dtype: "torch.dtype", pp: int, ep: int, micro_batches: int, loss_of: Callable
):
    """Returns this rank's parts of the model, as torchtitan builds them, the parallel dimensions, and the pipeline
    schedule or None."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.pipeline_parallel import pipeline_llm
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.deepseek_v3.parallelize import parallelize_deepseekv3

    parallelism = ParallelismConfig(
        pipeline_parallel_degree=pp,
        pipeline_parallel_microbatch_size=len(tokens_BS) // micro_batches,
        expert_parallel_degree=ep,
        spmd_backend="partial_dtensor",
    )
    training = TrainingConfig(
        local_batch_size=len(tokens_BS),
        seq_len=tokens_BS.shape[1] - 1,
        mixed_precision_param=str(dtype).removeprefix("torch."),
        disable_cuda_graphs=True,
    )
    config = _config(model, mtp=False)
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism, training=training))
    set_spmd_backend(parallelism.spmd_backend)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dims.build_mesh()
    with torch.device("meta"):
        whole = config.build()
    common = {
        "parallel_dims": dims, "training": training, "parallelism": parallelism,
        "compile_config": CompileConfig(enable=False), "ac_config": None, "dump_folder": "",
    }  # fmt: skip
    if pp > 1:
        pipeline, parts, _, _ = pipeline_llm(
            whole,
            device=torch.device("cpu"),
            model_config=config,
            parallelize_fn=parallelize_deepseekv3,
            loss_fn=loss_of,
            **common,
        )
    else:
        pipeline, parts = None, [parallelize_deepseekv3(whole, **common)]
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights(buffer_device=None)
        part.train()
    return parts, dims, pipeline


def _cast(peer: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Casts only the weights. Rotations and balance biases keep their dtype."""
    for parameter in peer.parameters():
        parameter.data = parameter.data.to(dtype)


def _config(model: Model, mtp: bool):
    """torchtitan's configuration with the sizes of ours."""
    from torchtitan.models import deepseek_v3 as titan
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    layers = titan.build_mla_moe_layers(
        n_layers=model.layers,
        n_dense_layers=model.dense_layers,
        dim=model.hidden,
        n_heads=model.heads,
        q_lora_rank=model.q_rank or 0,
        kv_lora_rank=model.kv_rank,
        qk_nope_head_dim=model.nope_head_dim,
        qk_rope_head_dim=model.rope_head_dim,
        v_head_dim=model.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=model.dense_width,
        moe_hidden_dim=model.expert_width,
        num_experts=model.experts,
        num_shared_experts=model.shared_experts,
        router_top_k=model.top_k,
        router_score_func="sigmoid",
        router_num_expert_groups=model.groups if model.groups > 1 else None,
        router_num_limited_groups=model.top_groups if model.groups > 1 else None,
        router_route_scale=model.route_scale,
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=titan._LINEAR_INIT,
        norm_init=titan._NORM_INIT,
        depth_init=titan._depth_init,
        depth_experts_init=titan._depth_experts_init,
        rope=ComplexRoPE.Config(dim=model.rope_head_dim, max_seq_len=model.max_seq_len, theta=10000.0),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return titan.DeepSeekV3Model.Config(
        vocab_size=model.vocab_size,
        dim=model.hidden,
        tok_embeddings=Embedding.Config(
            num_embeddings=model.vocab_size, embedding_dim=model.hidden, param_init=titan._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=model.hidden, param_init=titan._NORM_INIT),
        lm_head=Linear.Config(
            in_features=model.hidden,
            out_features=model.vocab_size,
            param_init=titan._output_linear_init(model.hidden),
        ),
        layers=layers,
        mtp_layers=titan._build_mtp_layers(layers[-1], dim=model.hidden, num_mtp_layers=int(mtp)),
    )
