"""Muon's update: momentum, which elements form one matrix, the matrix's owner, and the limit of attention scores."""

import torch

from parallel.owners import MatrixOwners
from parallel.zero.engine import Zero
from tests.prove.mutations.registry import OURS, RESUME, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.loop.state import RunState
from train.optim import matrices, muon
from train.optim.muon import Muon
from train.optim.qk_clip import QKClip

CLIPPED = r"master.*(q_up|kv_up)"


@mutation(OURS + ": the gradient is made orthogonal before it is clipped", "muon", UPDATE, "momentum|master")
def orthogonal_before_the_clip(bug: Seams) -> None:
    bug.around(
        Muon, "_add_momentum", lambda original, self, param, gradients, factor: original(self, param, gradients, None)
    )


@mutation(
    OURS + ": gradients that no other rank shares reach the momentum in the wrong order",
    "muon bf16",
    UPDATE,
    "momentum.*experts",
    "recipe",
)
def momentum_of_another_weight(bug: Seams) -> None:
    bug.around(
        Muon,
        "_add_momentum",
        lambda original, self, param, gradients, factor: original(self, param, gradients[::-1], factor),
    )


@mutation(OURS + ": w1 and w3 are one matrix", "muon", UPDATE, r"master.*w13")
def gate_and_up_as_one(bug: Seams) -> None:
    bug.value(matrices, "STACKS", {part: stack for part, stack in matrices.STACKS.items() if "w13" not in part})


@mutation(
    OURS + ": experts that are stacked are one matrix, as for torch.optim.Muon",
    "muon experts",
    UPDATE,
    r"master.*experts",
)
def experts_as_one(bug: Seams) -> None:
    def stacked(original, name, shape, model, by_head):
        return original(name, shape if len(shape) == 2 else (shape[0] * shape[1], shape[2]), model, by_head)

    bug.around(muon, "logical_matrices", stacked)


@mutation(OURS + ": the heads of attention are one matrix", "muon", UPDATE, r"master.*attention")
def heads_as_one(bug: Seams) -> None:
    bug.around(
        muon, "logical_matrices", lambda original, name, shape, model, by_head: original(name, shape, model, False)
    )


@mutation(OURS + ": the latent and the rope key are one matrix", "muon", UPDATE, r"master.*kv_down")
def latent_and_rope_key_as_one(bug: Seams) -> None:
    bug.value(matrices, "STACKS", {part: stack for part, stack in matrices.STACKS.items() if "kv_down" not in part})


@mutation(OURS + ": an owner scales an update that is scaled where it lies", "muon", UPDATE, "master")
def owner_scales_too(bug: Seams) -> None:
    def back(original, self, pack, done, write, like):
        return original(
            self,
            pack,
            {number: factor * 0.2 * max(factor.shape) ** 0.5 for number, factor in done.items()},
            write,
            like,
        )

    bug.around(MatrixOwners, "_return", back)


@mutation(OURS + ": an update that comes back is not applied on the ranks that sent momentum", "muon", UPDATE, "master")
def updates_stay_with_the_owner(bug: Seams) -> None:
    def back(original, self, pack, done, write, like):
        finish = original(self, pack, done, write, like)

        def wait() -> None:
            held, self._travelling = self._travelling, lambda *_: iter(())
            finish()
            del self._travelling
            assert held is not None

        return wait

    bug.around(MatrixOwners, "_return", back)


@mutation(OURS + ": weights decay inside of what is made orthogonal", "muon decay", UPDATE, "master|decay")
def decay_inside(bug: Seams) -> None:
    def move(original, self, param, shard, gradients, group):
        with torch.no_grad():
            gradients[0].add_(param.detach(), alpha=group["weight_decay"])
        original(self, param, shard, gradients, group | {"weight_decay": 0.0})

    bug.around(Muon, "_move", move)


@mutation(OURS + ": no look ahead: the momentum itself is made orthogonal", "muon", UPDATE, "master")
def no_nesterov(bug: Seams) -> None:
    def add(original, self, param, gradients, factor):
        original(self, param, gradients, factor)
        first = 0
        for gradient in gradients:
            gradient.copy_(self.allocate(param)["momentum"].view(-1)[first : first + gradient.numel()])
            first += gradient.numel()

    bug.around(Muon, "_add_momentum", add)


@mutation(OURS + ": the scale of an update is a quarter, not a fifth", "muon", UPDATE, "master")
def scale_of_a_quarter(bug: Seams) -> None:
    bug.value(muon, "UPDATE_SIZE", 0.25)


@mutation(
    OURS + ": after a resume an expert has the momentum of its neighbour",
    "muon experts",
    (UPDATE, RESUME),
    "momentum|master",
)
def momentum_of_the_neighbour(bug: Seams) -> None:
    def finish(original, self, updates):
        if updates:
            for name, shard in self.shards(copies=True).items():
                if name.startswith("momentum.") and ".experts." in name:
                    shard.local.copy_(shard.local.roll(shard.local.numel() // 2))
        original(self, updates)

    bug.around(Zero, "finish_load", finish)


@mutation(
    OURS + ": the count of updates goes on behind another optimizer", "muon after adamw", RESUME, "applied updates"
)
def count_goes_on(bug: Seams) -> None:
    bug.around(
        RunState, "finish_load",
        lambda original, self, meta: original(self, meta | {"updates": meta["step"]}),
    )  # fmt: skip


@mutation(
    OURS + ": tables keep the moments of another optimizer", "muon after adamw", (RESUME, UPDATE), "from the checkpoint"
)
def moments_stay(bug: Seams) -> None:
    def wanted(original, self, meta, *, own_optimizer=True):
        shards = original(self, meta, own_optimizer=own_optimizer)
        kept = {name: shard for name, shard in self.zero.shards(copies=True).items() if name.startswith("exp_avg")}
        return shards | kept

    bug.around(RunState, "wanted", wanted)


@mutation(OURS + ": heads of MTP are not clipped", "muon scores", UPDATE, r"master.*mtp")
def mtp_is_not_clipped(bug: Seams) -> None:
    bug.around(
        QKClip, "factors",
        lambda original, self, scores: {name: rows for name, rows in original(self, scores).items() if not name.startswith("mtp.")},
    )  # fmt: skip


@mutation(
    OURS + ": every rank acts on the largest score of its own tokens",
    "muon scores",
    ("forward", UPDATE),
    f"attention scores|{CLIPPED}",
)
def local_maximum(bug: Seams) -> None:
    def largest(original, self):
        held, self._most = self._most, lambda scores: None
        found = original(self)
        self._most = held
        return found

    bug.around(QKClip, "largest", largest)


@mutation(OURS + ": scores of the step before count", "muon scores", ("forward", UPDATE), f"attention scores|{CLIPPED}")
def scores_are_kept(bug: Seams) -> None:
    bug.around(QKClip, "clear", lambda original, self: None)


def change_rows(bug: Seams, change) -> None:
    """Give the factors of a product that makes heads, (heads, rows of each), to `change`, which writes into them."""

    def factors(original, self, scores_LH):
        found = original(self, scores_LH)
        for name, rows in found.items():
            change(name, rows.view(self._model.heads, -1), self._model)
        return found

    bug.around(QKClip, "factors", factors)


@mutation(OURS + ": the rope part of queries is scaled by the root", "muon scores", UPDATE, r"master.*q_up")
def rope_queries_by_the_root(bug: Seams) -> None:
    def change(name, rows_HR, model):
        if "q_up" in name:
            rows_HR[:, model.nope_head_dim :] = rows_HR[:, :1]

    change_rows(bug, change)


@mutation(OURS + ": values are scaled with the keys", "muon scores", UPDATE, r"master.*kv_up")
def values_are_scaled(bug: Seams) -> None:
    def change(name, rows_HR, model):
        if "kv_up" in name:
            rows_HR[:, model.nope_head_dim :] = rows_HR[:, :1]

    change_rows(bug, change)


@mutation(OURS + ": all heads are scaled as the one with the largest score", "muon scores", UPDATE, CLIPPED)
def one_factor_for_all_heads(bug: Seams) -> None:
    bug.around(
        QKClip,
        "factors",
        lambda original, self, scores: original(self, scores.amax(1, keepdim=True).expand_as(scores).clone()),
    )
