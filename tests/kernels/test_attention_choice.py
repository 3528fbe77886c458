"""The first attention core that computes correctly is used, and a core that does not is named."""

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model
from train.kernels import choice
from train.kernels.choice import ATTENTION_PARTS, build_kernels, choose_attention, choose_kernels, problem_of
from train.kernels.gpu.fused_attention import AttentionByKind, CudnnAttention, EfficientAttention, FlashAttention
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.attention import AttentionCore, AttentionInput, AttentionOutput, positions_first
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.model.sequence import Positions

CPU = torch.device("cpu")
HEADS = "model.nope_head_dim=128", "model.rope_head_dim=64", "model.v_head_dim=128"


@pytest.fixture
def config(monkeypatch):
    """Chosen on the CPU, which stands for the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    return compose(*HEADS)


class Failing(PlainAttention):
    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        raise RuntimeError("cuDNN Frontend error: no plan\nmore")


class AcrossDocuments(PlainAttention):
    """Sees earlier documents, too."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        return super().forward(given._replace(seen=Positions(given.q_BHTQ.size(2)).seen[0]), keep, largest)


class NoNumber(PlainAttention):
    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        made = super().forward(given, keep, largest)
        return made._replace(lse_BHT=made.lse_BHT * torch.nan)


class FromZero(PlainAttention):
    """Begins the search of a query's largest score at 0, as a kernel may that was tried with scores around 0 alone."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        scores = (given.q_BHTQ.float() @ given.k_BHSQ.float().mT * given.scale).tril()
        p = (scores - scores.amax(-1, keepdim=True).clamp_min(0)).exp().tril()
        out = positions_first(p / p.sum(-1, keepdim=True) @ given.v_BHSV.float(), given.v_BHSV.dtype)
        return AttentionOutput(out, p.sum(-1).log())


class HalvedKeys(PlainAttention):
    def backward(self, dout_BHTV, given: AttentionInput, made: AttentionOutput):
        dq, dk, dv = super().backward(dout_BHTV, given, made)
        return dq, dk / 2, dv


@pytest.mark.slow
@pytest.mark.parametrize("part", ATTENTION_PARTS)
@pytest.mark.parametrize("recipe", ["bf16", "fp32", "fp8"])
def test_right_values_pass_and_wrong_ones_are_named(config, part, recipe):
    config = compose(*HEADS, f"precision={recipe}")
    assert problem_of(PlainAttention(), config, CPU, part) is None
    assert f"is wrong for {part} (its log-sum-exp is off by" in problem_of(NoNumber(), config, CPU, part)
    assert f"is wrong for {part} (dk is off by" in problem_of(HalvedKeys(), config, CPU, part)
    assert problem_of(Failing(), config, CPU, part) == f"fails for {part} (cuDNN Frontend error: no plan)"


def test_a_core_that_fails_far_from_zero_and_one_that_fails_at_this_length_are_found(config):
    assert "is wrong for whole sequences (its result is off by nan" in problem_of(
        FromZero(), config, CPU, "whole sequences"
    )
    asked = []

    class Watching(PlainAttention):
        def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
            asked.append(given.q_BHTQ.shape)
            return super().forward(given, keep, largest)

    config = compose(*HEADS, "seq_len=200", "model.heads=6")
    assert problem_of(Watching(), config, CPU, "documents") is None
    assert [(shape[1], shape[2]) for shape in asked] == [(6, 200), (6, 199)]


def test_a_core_that_is_right_for_whole_sequences_alone(config):
    assert problem_of(AcrossDocuments(), config, CPU, "whole sequences") is None
    assert "(its result is off by" in problem_of(AcrossDocuments(), config, CPU, "documents")


@pytest.mark.slow
def test_the_second_choice_is_named_in_a_note(config, monkeypatch):
    last = PlainAttention()
    monkeypatch.setattr(choice, "CORES", {"one": Failing(), "two": AcrossDocuments(), "three": last})
    core, [note] = choose_attention(compose(*HEADS, "data.mask_documents=true"), CPU)
    assert core is last
    assert "this run takes three for documents as one fails for whole sequences (cuDNN Frontend" in note
    assert "; two is wrong for documents (" in note
    core, [note] = choose_attention(config, CPU)
    assert type(core) is AcrossDocuments and "documents" not in note  # which this run has none of
    monkeypatch.setattr(choice, "CORES", {"one": last, "two": Failing()})
    assert choose_attention(config, CPU) == (last, [])


class Whole(EfficientAttention):
    """As cuDNN's: no pieces of any length."""

    takes_documents = False


@pytest.fixture
def cores(monkeypatch) -> dict[str, AttentionCore]:
    """A fast one for whole sequences, one that knows documents, and a slower one; all of them are right."""
    found = {"one": Whole(), "two": FlashAttention(), "three": EfficientAttention(), "last": PlainAttention()}
    monkeypatch.setattr(choice, "CORES", found)
    monkeypatch.setattr(choice, "problem_of", lambda *given: None)
    return found


def test_documents_have_a_core_of_their_own(config, cores, monkeypatch):
    masked = compose(*HEADS, "data.mask_documents=true")
    assert choose_attention(config, CPU) == (cores["one"], [])
    core, notes = choose_attention(masked, CPU)
    assert type(core) is AttentionByKind and notes == []
    assert (core.whole, core.documents) == (cores["one"], cores["two"])
    wrong = {cores["two"]: "is wrong"}
    monkeypatch.setattr(choice, "problem_of", lambda core, *given: wrong.get(core))
    core, [note] = choose_attention(masked, CPU)
    assert core.documents is cores["three"] and note == "this run takes three for documents as two is wrong"
    wrong[cores["three"]] = "is wrong too"
    core, [note] = choose_attention(masked, CPU)
    assert core is cores["last"] and "three is wrong too" in note
    wrong.clear()
    wrong[cores["one"]] = "fails"
    core, [note] = choose_attention(masked, CPU)
    assert core is cores["two"] and note == "this run takes two as one fails"


def test_ranks_that_share_sequences_try_blocks_of_keys_with_both(cores, monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "problem_of", lambda core, config, device, part: tried.append((core, part)))
    choose_attention(compose(*HEADS, "data.mask_documents=true", "parallel.cp=2", "parallel.dp=1"), CPU)
    assert tried == [
        *((cores["one"], part) for part in ("whole sequences", "blocks of keys")),
        *((cores["two"], part) for part in ATTENTION_PARTS),
    ]


def test_cudnn_is_left_out_where_bits_are_to_be_repeated(config, monkeypatch):
    monkeypatch.setattr(choice, "problem_of", lambda *given: None)
    assert type(choose_attention(config, CPU)[0]) is CudnnAttention
    core, [note] = choose_attention(compose(*HEADS, "cluster.deterministic=true"), CPU)
    assert type(core) is FlashAttention and "cuDNN's attention may give other bits in each run" in note


def test_where_none_works_the_run_is_refused(config, monkeypatch):
    monkeypatch.setattr(choice, "CORES", {"one": Failing()})
    with pytest.raises(
        UserError, match=r"gives correct values on NVIDIA H100: one fails for whole sequences"
    ) as refused:
        choose_attention(config, CPU)
    assert "cluster.device=cpu" in refused.value.cure


def test_a_cpu_has_the_models_own():
    kernels, notes = choose_kernels(compose(), CPU)
    assert type(kernels) is type(build_kernels("cpu")) and notes == []


def test_every_block_takes_the_core_that_it_is_given():
    """The MTP modules' too; rectangles of a micro-batch are made once."""
    used = []

    class Watched(PlainAttention):
        def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
            used.append(given.seen)
            return super().forward(given, keep, largest)

    small = Model(vocab_size=64, hidden=32, layers=2, dense_layers=1, heads=2, q_rank=16, kv_rank=16, nope_head_dim=16,
                  rope_head_dim=8, v_head_dim=16, dense_width=64, expert_width=16, experts=4, top_k=2, groups=2,
                  top_groups=1, mtp_depth=1)  # fmt: skip
    tokens_BS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
    documents_BS = (torch.arange(13) > 6).int().expand(2, -1)
    kernels = PlainKernels()
    kernels.core = Watched()
    model = DeepSeekV3.whole(small, HighPrecision(torch.float32, kernels), seq_len=12, device="meta")
    initialise(model, 1)
    model(tokens_BS)
    first, second, mtp = (seen.rectangles for seen in used)
    assert first is second and first == [(None, 0, 12, 0, 12, 0)] and mtp == [(None, 0, 11, 0, 11, 0)]
    used.clear()
    model(tokens_BS, documents_BS=documents_BS)
    assert used[0] is used[1]
    assert [[(one.sequence, one.first_query, one.last_query) for one in seen.rectangles] for seen in used] == [
        [(0, 0, 7), (0, 7, end), (1, 0, 7), (1, 7, end)] for end in (12, 12, 11)
    ]
