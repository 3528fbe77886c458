"""The recipes in which the bugs run: everything that a bug may need is switched on, in the smallest sizes."""

MODEL = {
    "vocab_size": 53, "hidden": 16, "layers": 3, "dense_layers": 1, "heads": 2, "q_rank": 8, "kv_rank": 8,
    "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6, "dense_width": 24, "expert_width": 8, "experts": 8,
    "top_k": 2, "groups": 4, "top_groups": 2, "group_top_k": 2, "mtp_depth": 2, "loss_chunk": 7, "init_std": 0.2,
    "recompute": "[norm,mla_up,swiglu]", "yarn.always": "true", "yarn.original_seq_len": 6,
}  # fmt: skip
BASE = [
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    "mode=prove", "steps=3", "precision=fp32", "precision.moments=fp32", "seq_len=12", "batch_size=6", "micro_batch_size=1",
    "data.mask_documents=true", "optim.clip=0.1", "optim.warmup_steps=2", "optim.batch_ramp_start=4",
    "optim.batch_ramp_steps=1", "optim.batch_ramp_increment=2", "optim.bias_speed=[{until: 1.0, value: 0.02}]",
    "optim.balance_loss=0.01", "cluster.threads=1", "cluster.device=cpu", "cluster.compiled=false",
]  # fmt: skip
MORE = ["batch_size=12", "optim.batch_ramp_start=8", "optim.batch_ramp_increment=4"]
COPIES, EXPERTS = [*BASE, "parallel.dp=2"], [*BASE, "parallel.dp=2", "parallel.ep=2"]
CHATS = ["data.mask_documents=false", "data.format=chat"]
LORA = ["adapter=lora", "adapter.rank=16", "optim.bias_speed=[{until: 1.0, value: 0.0}]"]
NODES = ["parallel.dispatch=node_limited"]
FEW = [
    "model.layers=2",
    "model.mtp_depth=1",
    "steps=3",
    "batch_size=4",
    "optim.batch_ramp_start=null",
    "optim.batch_ramp_steps=0",
]
LOW = [*BASE, *FEW, "precision=fp8", "model.hidden=136", "cluster.compiled=true"]
SMALL = ["optim.mtp_weight=[{until: 1.0, value: 1e-4}]"]
"""Gradients of MTP that are smaller than the smallest activations a scale is made for."""
STAGES = [*BASE, "parallel.pp=2", "model.layers=4"]
SPARSE = [
    *BASE, "model.sparse.heads=3", "model.sparse.head_dim=6", "model.sparse.top_k=4", "model.sparse.pattern=FFS",
    "data.mask_documents=false",
]  # fmt: skip
WARM = ["optim.index_warmup=true", "optim.bias_speed=[{until: 1.0, value: 0.0}]"]
RECIPES = {
    "copies": COPIES,
    "experts": EXPERTS,
    "many experts": [*EXPERTS, "model.experts=32"],
    "norms decay": [*COPIES, "optim.decay_norms=true"],
    "layers again": [*EXPERTS, "model.recompute=[layer]"],
    "nodes": [*EXPERTS, *NODES, "cluster.ranks_per_node=1"],
    "two hops": [*BASE, *MORE, "parallel.dp=4", "parallel.ep=4", *NODES, "cluster.ranks_per_node=2"],
    "two sequences": [*COPIES, *MORE, "micro_batch_size=2"],
    "uneven": [
        *COPIES,
        "parallel.uneven=true",
        "batch_size=5",
        "optim.batch_ramp_start=null",
        "optim.batch_ramp_steps=0",
    ],
    "chats": [*COPIES, *CHATS],
    "chats shared": [*BASE, *CHATS, "parallel.cp=2"],
    "chats with biases": [*COPIES, *CHATS, "optim.bias_speed=[{until: 1.0, value: 0.0}]"],
    "adapters": [*EXPERTS, *LORA],
    "adapters in blocks": [*EXPERTS, *LORA, "adapter.base=fp8"],
    "adapters bf16": [*EXPERTS, *FEW, *LORA, "precision=bf16"],
    "adapters fp8": [*LOW, "parallel.dp=2", "parallel.ep=2", *LORA],
    "adapters dropped": [*LOW, "parallel.dp=2", "parallel.ep=2", *LORA, "adapter.base=fp8", "adapter.dropout=0.25"],
    "shared": [*BASE, "parallel.cp=2"],
    "shared bf16": [*BASE, *FEW, "precision=bf16", "parallel.cp=2"],
    "best kept": [*COPIES, "steps=4", "checkpoint.keep_best=true"],
    "three copies": [
        *BASE,
        "parallel.dp=3",
        "batch_size=9",
        "optim.batch_ramp_start=6",
        "optim.batch_ramp_increment=3",
    ],
    "three stages": [*BASE, "parallel.pp=3", "model.layers=4"],
    "many local": [*BASE, *FEW, "precision=bf16", "model.experts=32"],
    "adapters in fp32": [*BASE, *FEW, *LORA, "adapter.dropout=0.25"],
    "sparse": SPARSE,
    "sparse documents": [*SPARSE, "data.mask_documents=true", "model.sparse.top_k=2"],
    "sparse again": [*SPARSE, "model.recompute=[layer]", "model.mtp_depth=0"],
    "sparse chats": [*SPARSE, *CHATS],
    "sparse shared": [*SPARSE, "parallel.cp=2"],
    "sparse warm-up": [*SPARSE, *WARM],
    "sparse warm-up zero 3": [*SPARSE, *WARM, "parallel.dp=2", "parallel.zero=3"],
    "pipeline": [*BASE, "parallel.pp=2"],
    "zbv": [*STAGES, "parallel.schedule=zbv"],
    "dualpipev": [*STAGES, "parallel.schedule=dualpipev"],
    "interleaved": [*STAGES, "parallel.schedule=interleaved"],
    "two chunks": [*COPIES, *FEW, "precision=bf16", "parallel.schedule=dualpipev"],
    "host": [*BASE, "model.offload=[layer]"],
    "zero 3": [*COPIES, "parallel.zero=3"],
    "offloaded": [*COPIES, "parallel.offload_optimizer=true"],
    "moments in bf16": [*COPIES, "precision.moments=bf16"],
    "skips": [*COPIES, "steps=4"],
    "skips offloaded": [*BASE, *FEW, "steps=4", "precision=bf16", "parallel.dp=2", "parallel.offload_optimizer=true"],
    "skips averaged": [*COPIES, "steps=4", "optim.ema_decay=0.9"],
    "loose clip": [*COPIES, "optim.clip=1e3"],
    "loud": [*COPIES, "optim.lr=0.1"],
    "many heads": [*BASE, "model.heads=8", "data.mask_documents=false"],
    "wide": [*BASE, "model.vocab_size=101", "model.loss_chunk=12"],
    "bf16 plain": [*BASE, *FEW, "precision=bf16"],
    "bf16": [*BASE, *FEW, "precision=bf16", "cluster.compiled=true"],
    "fp8": LOW,
    "fp8 small": [*LOW, *SMALL],
    "fp8 wire": [*LOW, "parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"],
    "fp8 wire small": [*LOW, *SMALL, "parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"],
    "muon": [*COPIES, "optim=muon"],
    "muon decay": [*COPIES, "optim=muon", "optim.weight_decay=1.0"],
    "muon experts": [*EXPERTS, "optim=muon"],
    "muon bf16": [*EXPERTS, *FEW, "optim=muon", "precision=bf16", "cluster.compiled=true"],
    "muon after adamw": [*COPIES, "optim=muon", "prove.first_optimizer=adamw"],
    "muon scores": [*COPIES, "optim=muon", "optim.qk_clip=0.01"],
    "averaged": [*COPIES, "optim.ema_decay=0.9"],
    "phases": [
        *COPIES,
        "optim.lr_schedule=[{until: 0.5, value: 1.0}, {until: 0.9, value: 0.5, shape: cosine}, {until: 1.0, value: 0.1}]",
    ],
    "eps of latents": [*COPIES, "model.latent_norm_eps=0.1"],
    "tiny rate": [*COPIES, "optim.lr=1e-6", "optim.ema_decay=0.999"],
}
