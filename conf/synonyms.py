"""Words of a command line: names of keys and values in other programs, keys that only some modes read, and keys that
exclude each other.

A word of another program needs an entry only if no key of Sluice resembles it, or if the most similar key is the wrong
one.
"""

from conf.schema import Mode

KEYS = {
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "batch": "batch_size",
    "block_size": "seq_len",
    "bs": "batch_size",
    "chat_template": "data.template",
    "chat_template_kwargs": "data.template_keys",
    "ckpt": "resume",
    "context_length": "seq_len",
    "context_parallel_size": "parallel.cp",
    "data_parallel_size": "parallel.dp",
    "dataset": "data.path",
    "dtype": "precision",
    "eval_every": "log.validate_every",
    "eval_steps": "log.validate_every",
    "expert_parallel_size": "parallel.ep",
    "experiment": "name",
    "fp8": "precision",
    "from_pretrained": "init_from",
    "global_batch_size": "batch_size",
    "gradient_clipping": "optim.clip",
    "gradient_clip": "optim.clip",
    "grad_clip": "optim.clip",
    "head_dim": "model.nope_head_dim",
    "hidden_dim": "model.hidden",
    "hidden_size": "model.hidden",
    "iterations": "steps",
    "learning_rate": "optim.lr",
    "load_from": "resume",
    "local_batch_size": "micro_batch_size",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "log_every": "log.every",
    "logging_steps": "log.every",
    "max_grad_norm": "optim.clip",
    "max_iters": "steps",
    "max_length": "seq_len",
    "max_steps": "steps",
    "mbs": "micro_batch_size",
    "model_name_or_path": "init_from",
    "model_path": "init_from",
    "moe_top_k": "model.top_k",
    "num_attention_heads": "model.heads",
    "num_epochs": "epochs",
    "num_experts": "model.experts",
    "num_experts_per_tok": "model.top_k",
    "num_hidden_layers": "model.layers",
    "num_layers": "model.layers",
    "num_steps": "steps",
    "num_train_epochs": "epochs",
    "num_workers": "data.workers",
    "n_layers": "model.layers",
    "n_routed_experts": "model.experts",
    "n_shared_experts": "model.shared_experts",
    "output_dir": "runs",
    "per_device_train_batch_size": "micro_batch_size",
    "pipeline_parallel_size": "parallel.pp",
    "resume_from_checkpoint": "resume",
    "run_name": "name",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "sequence_length": "seq_len",
    "total_steps": "steps",
    "train_iters": "steps",
    "training_steps": "steps",
    "warmup": "optim.warmup_steps",
    "wandb.mode": "log.wandb",
    "wandb_mode": "log.wandb",
    "zero_stage": "parallel.zero",
}
"""Maps a word that a user may type to the intended key."""

VALUES = {
    ("log.wandb", "online"): ("auto", "is online if W&B has an API key"),
    ("log.wandb", "true"): ("auto", "is online if W&B has an API key"),
    ("log.wandb", "on"): ("auto", "is online if W&B has an API key"),
    ("log.wandb", "false"): ("disabled", "turns W&B off"),
    ("log.wandb", "off"): ("disabled", "turns W&B off"),
    ("log.wandb", "none"): ("disabled", "turns W&B off"),
    ("precision.name", "bfloat16"): ("bf16", "is bfloat16"),
    ("precision.name", "float32"): ("fp32", "is float32"),
    ("precision", "bfloat16"): ("bf16", "is bfloat16"),
    ("precision", "float32"): ("fp32", "is float32"),
    ("cluster.device", "gpu"): ("cuda", "uses GPUs"),
}
"""Maps a key and a wrong value (in lower case) to the value that the user probably means, and text about its effect."""

NO_TENSOR_PARALLELISM = "there is no tensor parallelism: parallel.pp distributes layers, parallel.ep experts, parallel.cp positions, and parallel.zero=3 weights"
NO_TENSORBOARD = "there is no TensorBoard: open report.html in the run folder, or use W&B (log.wandb)"
PACKING = "leave it out: sequences are always packed; data.mask_documents=true keeps attention within a document"
QLORA = "write adapter=lora adapter.base=fp8"
RECOMPUTATION = "write 'model.recompute=[layer]'"
ACCUMULATION = "each rank accumulates gradients over batch_size / (micro_batch_size x parallel.dp) micro-batches: set batch_size and micro_batch_size"
CURES = {
    "accumulation_steps": ACCUMULATION,
    "gradient_accumulation_steps": ACCUMULATION,
    "activation_checkpoint": RECOMPUTATION,
    "activation_checkpointing": RECOMPUTATION,
    "bf16": "write precision=bf16",
    "cosine": "write 'optim.lr_schedule=[{until: 1.0, value: 0.1, shape: cosine}]'",
    "lr_scheduler_type": "set optim.lr_schedule, such as 'optim.lr_schedule=[{until: 1.0, value: 0.1, shape: cosine}]'",
    "dpo": "there is no preference training; tune on chats (conf=tiny_chat), or write a custom loop with log-probabilities from mode=score",
    "fsdp": "write parallel.zero=3",
    "gradient_checkpointing": RECOMPUTATION,
    "load_in_4bit": QLORA,
    "load_in_8bit": QLORA,
    "qlora": QLORA,
    "report_to": NO_TENSORBOARD,
    "reshard_after_forward": "write parallel.zero=3, or parallel.zero=2 to keep all weights on every rank",
    "sample_packing": PACKING,
    "tensor_model_parallel_size": NO_TENSOR_PARALLELISM,
    "tensor_parallel": NO_TENSOR_PARALLELISM,
    "tensor_parallel_degree": NO_TENSOR_PARALLELISM,
    "tensor_parallel_size": NO_TENSOR_PARALLELISM,
    "tensorboard": NO_TENSORBOARD,
    "torch_compile": "leave it out: fused kernels are written by hand; cluster.compiled turns CPU kernels on or off",
    "tp": NO_TENSOR_PARALLELISM,
    "train_on_inputs": "write data.supervise=all for chats",
}
"""Fixes for words that stand for no single key of Sluice. A word is a typed key, the last part of a key, a value or a
flag."""

COMMANDS = ("doctor", "runs", "launch", "why", "top")
"""Commands that may follow `sluice` instead of settings; train/__main__.py runs them."""

OWN_KEYS: dict[str, tuple[Mode, ...]] = {
    "average": (Mode.average,),
    "dry_run": (Mode.dry_run,),
    "evaluate": (Mode.evaluate,),
    "export": (Mode.export,),
    "generate": (Mode.generate,),
    "plan.calibrate": (Mode.plan,),
    "plan.devices": (Mode.plan,),
    "plan.search": (Mode.plan,),
    "plan.tokens": (Mode.plan,),
    "plan.write": (Mode.plan,),
    "profile": (Mode.train, Mode.dry_run),
    "prove": (Mode.prove,),
    "score": (Mode.score,),
}
"""The modes that read a section. Other modes refuse it."""

INSTEAD_OF: dict[str, tuple[str, ...]] = {
    "steps": ("epochs",),
    "epochs": (),
    "data": ("data.mix", "data.source"),
    "data.path": ("data.mix", "data.source"),
    "data.mix": ("data.path", "data.source"),
    "data.source": ("data.path", "data.mix"),
    "data.format": ("data.mix", "data.source"),
    "data.text_key": ("data.mix", "data.source"),
    "data.template": ("data.template_function",),
    "data.template_function": ("data.template",),
}
"""Maps a key to the keys that disable it. If the user types the key, the recipe's values of the disabling
keys are cleared."""
