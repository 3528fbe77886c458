"""Checkpoints, and runs that resume from them."""

import math
from dataclasses import replace

from parallel.zero.engine import Zero
from tests.prove.mutations.registry import OURS, RESUME, SETTINGS, mutation
from tests.prove.mutations.seams import Seams
from train.checkpoint import read_shards
from train.checkpoint.staging import StagingBuffers
from train.loop.state import RunState
from train.optim.schedules import Schedules


@mutation(
    "verl-project/verl#7401, modelscope/ms-swift#10050: the data do not go on where they ended",
    "copies",
    RESUME,
    "first_sample|position in the data",
)
def resumed_one_sample_off(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta | {"samples": meta["samples"] + 1})

    bug.around(RunState, "finish_load", finish_load)


@mutation("flagos-ai/FlagScale#411: balance biases are not in the checkpoint", "copies", RESUME, "bias")
def biases_lost_in_the_checkpoint(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta)
        for one in self.routers.values():
            one.bias_E.zero_()

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "areal-project/AReaL#1468, deepspeedai/DeepSpeed#564: Adam starts to count again",
    "copies",
    RESUME,
    "updates|master",
)
def adam_count_lost_in_the_checkpoint(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta | {"updates": 0})

    bug.around(RunState, "finish_load", finish_load)


@mutation("LBANN/lbann#1510: one of the two moments is not handed on", "copies", RESUME, "exp_avg")
def moments_lost_in_the_checkpoint(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta)
        for name, shard in self.zero.shards().items():
            if name.startswith("exp_avg_sq."):
                shard.local.zero_()

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "facebookresearch/deit#173: the average begins again from the weights",
    "averaged",
    RESUME,
    "state (from the|in a) checkpoint|average",
)
def average_lost_in_the_checkpoint(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta | {"has_ema": False})

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "atomistic-machine-learning/schnetpack#785: a run goes on from the average",
    "averaged",
    RESUME,
    "state (from the|in a) checkpoint",
)
def resumed_from_the_average(bug: Seams) -> None:
    def finish_load(original, self, meta):
        for name, shard in self.shards().items():
            if name.startswith("ema."):
                self.zero.shards()["master." + name.removeprefix("ema.")].local.copy_(shard.local)
        original(self, meta)

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "ISEEKYAN/Megatron-LM#104, NVIDIA/Megatron-LM#6920: weights are not those of the masters that were read",
    "copies",
    RESUME,
    "layers|embedding|norm|loss",
)
def weights_not_refreshed_from_the_checkpoint(bug: Seams) -> None:
    def finish_load(original, self, updates):
        original(self, updates)
        if updates:  # as after other updates
            for param in self.names:
                param.data.mul_(1.01)

    bug.around(Zero, "finish_load", finish_load)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#3397: masters are made of rounded weights",
    "copies",
    RESUME,
    "state (from the|in a) checkpoint",
)
def masters_from_rounded_weights(bug: Seams) -> None:
    def finish_load(original, self, meta):
        for name, shard in self.zero.shards().items():
            if name.startswith("master."):
                shard.local.copy_(shard.local.bfloat16())
        original(self, meta)

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "KempnerInstitute/KempnerForge#115: both moments begin at 0", "pipeline", RESUME, "state (from the|in a) checkpoint"
)
def both_moments_lost(bug: Seams) -> None:
    def finish_load(original, self, meta):
        for name, shard in self.zero.shards().items():
            if name.startswith("exp_avg"):
                shard.local.zero_()
        original(self, meta)

    bug.around(RunState, "finish_load", finish_load)


@mutation(OURS + ": the two moments change places", "copies", RESUME, "state (from the|in a) checkpoint")
def moments_change_places(bug: Seams) -> None:
    def finish_load(original, self, meta):
        shards = self.zero.shards()
        for name in (name for name in shards if name.startswith("exp_avg.")):
            first, second = shards[name].local, shards["exp_avg_sq." + name.removeprefix("exp_avg.")].local
            held = first.clone()
            first.copy_(second)
            second.copy_(held)
        original(self, meta)

    bug.around(RunState, "finish_load", finish_load)


@mutation("flagos-ai/FlagScale#411: biases reach the first rank alone", "copies", RESUME, "bias")
def biases_reach_the_first_rank_alone(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta)
        for one in self.routers.values() if self.mesh.rank else ():
            one.bias_E.zero_()

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "ServiceNow/Fast-LLM#256: shards that overlap those of another layout are read wrongly",
    "experts",
    RESUME,
    "state (from the|in a) checkpoint",
)
def a_piece_of_another_place(bug: Seams) -> None:
    def pieces(original, manifest, name, shard, rounded):
        found = original(manifest, name, shard, rounded)
        if len(found) != 2 or len(found[0][1].target) != len(found[1][1].target):
            return found
        (rank, first), (other, second) = found
        return [(rank, replace(first, target=second.target)), (other, replace(second, target=first.target))]

    bug.around(read_shards, "_pieces", pieces)


@mutation(
    "NovaSky-AI/SkyRL#1403: experts of another rank are read",
    "pipeline",
    RESUME,
    "state (from the|in a) checkpoint.*experts",
)
def experts_of_another_rank_read(bug: Seams) -> None:
    def wanted(original, self, meta, *, own_optimizer=True):
        shards = original(self, meta, own_optimizer=own_optimizer)
        for name, shard in shards.items():
            size, most = shard.local.numel(), math.prod(shard.shape)
            if ".experts." in name and 2 * size == most:
                shards[name] = replace(shard, offset=(shard.offset + size) % most)
        return shards

    bug.around(RunState, "wanted", wanted)


@mutation("NVIDIA-NeMo/Speech#3293: warm-up begins again", "copies", (RESUME, SETTINGS), "lr")
def warm_up_begins_again(bug: Seams) -> None:
    def plan(original, self, step, shift=0):
        found = original(self, step, shift)
        return found if self.config.resume in ("auto", "never") else replace(found, lr=found.lr * 0.5)

    bug.around(Schedules, "plan", plan)


@mutation(
    "huggingface/transformers#40691: data begin again from the start",
    "copies",
    (RESUME, SETTINGS),
    "first_sample|position in the data",
)
def data_begin_again(bug: Seams) -> None:
    def finish_load(original, self, meta):
        original(self, meta | {"samples": 0})

    bug.around(RunState, "finish_load", finish_load)


@mutation(
    "allenai/OLMo#182, InfiniTensor/InfiniTrain#195: data go on where steps of the new batch would have ended",
    "copies",
    (RESUME, SETTINGS),
    "first_sample",
)
def data_position_from_the_new_batch(bug: Seams) -> None:
    bug.around(Schedules, "plan", lambda original, self, step, shift=0: original(self, step, 0))


@mutation(
    "huggingface/transformers#40691 has the like for data: schedules go on as of the run before, whose steps were others",
    "copies",
    (RESUME, SETTINGS),
    "lr|mtp_weight",
)
def schedules_of_the_run_before(bug: Seams) -> None:
    steps: list[int] = []

    def finish_load(original, self, meta):
        steps[:] = [meta["config"]["steps"]]
        original(self, meta)

    def plan(original, self, step, shift=0):
        found = original(self, step, shift)
        if not steps or steps[0] == self.config.steps or self.config.resume in ("auto", "never"):
            return found
        before = Schedules(replace(self.config, steps=steps[0], resume="never")).plan(min(step, steps[0]))
        return replace(found, lr=before.lr, mtp_weight=before.mtp_weight)

    bug.around(RunState, "finish_load", finish_load)
    bug.around(Schedules, "plan", plan)


@mutation(
    "NVIDIA/Megatron-LM#7398 has the like for activations: what is saved is what is there when it is written",
    "copies",
    (RESUME, "checkpoint"),
    "state|disk|checkpoint",
)
def saved_when_it_is_written(bug: Seams) -> None:
    waiting: dict[int, dict] = {}

    def copy(original, self, shards):
        waiting[id(self)] = shards
        original(self, shards)

    def write(original, self, folder, rank):
        StagingBuffers.copy.__wrapped__(self, waiting[id(self)])
        return original(self, folder, rank)

    bug.around(StagingBuffers, "copy", copy)
    bug.around(StagingBuffers, "write", write)
