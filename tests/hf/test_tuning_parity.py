"""20 steps of a tune on chats equal those of transformers' model under torch's AdamW, in fp32, from one folder of weights.

Ours packs chats into sequences; theirs sees one chat at a time, so that nothing of another can reach it. The same batches, loss per learnt
token of the step, clipping, rates and decay (of matrices alone). Losses agree to 2e-6 of themselves, and weights to 1e-4 of the largest
movement of their tensor (2.0e-7 and 1.8e-5 at most with MKL's AVX-512 and its AVX2).

AdamW divides by |gradient| + eps, so that an error d of a gradient moves a weight by up to lr d / eps. With the usual eps of 1e-8 one
element decides on the result: its first gradient is 1.7e-8 where the median is 4.9e-4, MKL's two orders of the sum are 5e-10 apart, and
the weight was 7e-5 or 1.04e-4 of the movement off. With an eps of 1e-6 such an error moves a weight by 1e-3 x 5e-10 / 1e-6 = 5e-7, which
is 3e-5 of the movement of 0.0154.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from conf.load import compose
from conf.schema import Model
from tests.hf.small import MODEL, read_folder, transformers_folder
from tests.layouts import train_on
from tests.loop.test_tuning import overrides
from tests.model.parity import as_in_files
from tests.small import metrics
from train.data.batch import Batch
from train.data.corpus import build_corpus
from train.data.dataset import TrainingData
from train.export.run import export
from train.optim.schedules import Schedules

torch.set_num_threads(1)
STEPS = 20


def chats_of(batch: Batch):
    """Tokens of each chat, and which of them are learnt."""
    for tokens_S, documents_S, learnt_S in zip(batch.tokens_BS, batch.documents_BS, batch.supervised_BS, strict=True):
        for number in documents_S[documents_S >= 0].unique():
            here = documents_S == number
            yield tokens_S[here], learnt_S[here]


def theirs_trained(folder, config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights behind the last, by the names of files."""
    model, optim = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(), config.optim
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    update = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)
    data, schedules, losses = TrainingData(build_corpus(config), config), Schedules(config), []
    for step in range(1, STEPS + 1):
        plan = schedules.plan(step, 0)
        batch = data.batch(plan.first_sample, plan.batch_size)
        update.zero_grad()
        total = 0.0
        for tokens_S, learnt_S in chats_of(batch):
            if learnt_S[1:].any():
                logits_TV = model(tokens_S[None, :-1]).logits[0]
                targets_T = tokens_S[1:].masked_fill(~learnt_S[1:], -100)
                loss = F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum") / batch.targets
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in update.param_groups:
            group["lr"] = plan.lr
        update.step()
        losses.append(total)
    return losses, as_in_files({name: value.detach() for name, value in model.state_dict().items()})


@pytest.mark.slow
def test_twenty_steps_are_those_of_transformers(tmp_path):
    words = overrides(tmp_path)
    rows = build_corpus(compose(*words)).tokenizer.vocab_size
    folder = tmp_path / "base"
    transformers_folder(folder, Model(**MODEL | {"vocab_size": rows, "max_seq_len": 512}))
    start = read_folder(folder)
    shape = [f"model.{key}={value}" for key, value in (MODEL | {"vocab_size": rows}).items()]
    given = [
        *words, *shape, "name=tuned", f"init_from={folder}", f"steps={STEPS}", "precision=fp32", "precision.moments=fp32",
        "optim.lr=1e-3", "optim.eps=1e-6", "optim.warmup_steps=3", "optim.weight_decay=0.1", "optim.clip=1.0", "optim.balance_loss=0",
        "optim.bias_speed=[{value: 0}]", "model.group_top_k=2", "model.latent_norm_eps=1e-6", "model.max_seq_len=4096",
    ]  # fmt: skip
    config = compose(*given)
    train_on(config, 1)
    losses, want = theirs_trained(folder, config)
    ours = metrics(tmp_path, "tuned")
    worst = max(abs(ours[step]["main_loss"] / losses[step - 1] - 1) for step in ours)
    assert losses[-1] < 0.95 * losses[0] and worst < 2e-6, worst
    to = ["mode=export", "name=tuned", f"runs={tmp_path}/runs", f"export.to={tmp_path}/out", "export.dtype=fp32"]
    export(compose(*to))
    got = read_folder(tmp_path / "out")
    assert got.keys() == want.keys() == start.keys()
    off = {}
    for name, value in want.items():
        moved = (value - start[name]).abs().max()
        if "correction_bias" in name:
            assert torch.equal(got[name], start[name]) and moved == 0
            continue
        off[name] = ((got[name] - value).abs().max() / moved).item()
    assert max(off.values()) < 1e-4, max(off.items(), key=lambda pair: pair[1])
