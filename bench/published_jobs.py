"""Published jobs of others that can run without tensor parallelism, each as the closest recipe.

A source is a laboratory with one release of its software, because rows of one source have correlated errors. All jobs
except the marked ones force balanced experts. Left out: jobs with tensor parallelism (Megatron-Bridge's 1024 H100,
torchtitan's 256 B200).

Megatron-Bridge: docs/performance-summary.md and -archive.md (all releases; DeepSeek-V3 and Kimi K2 on 256 devices; the
optimizer time is assumed to be ours), layouts of src/megatron/bridge/perf_recipes, reruns and Moonlight of
examples/model_verification_cards. If it hides the exchange of experts behind the other direction, as from 26.06 on
GB200 and GB300, the schedule is dualpipev, which does so here; else 1f1b or interleaved with its stages. From 26.06 on
GB300 attention is in FP8, assumed to be twice as fast; FP8 there is MXFP8, for which the rates of DeepGEMM's format are
used. Releases before 26.06 are assumed to recompute the same as the recipes of 26.08.
Automodel: docs/performance-summary.mdx of 2026-06; activation checkpoints are again whole layers; the 671B model has no
MTP, according to its operations per token; FSDP is ZeRO 1 here; gradients accumulated over several runs of the pipeline
count as separate steps.
SimuMax: docs/b200/b200_release_v1.2_summary.md, eight B200, four layers (one of them dense) without MTP, by
micro-batches of a rank.
DeepSeek: ISCA paper 2505.09343, table 4, on 2048 H800; the V2 report (172.8K hours a trillion tokens; its number of
devices is not published, 512 is assumed).
Found later: Megatron-Bridge 25.09 drops tokens; the layout of its GB200 row is assumed. dgxc-benchmarking 25.11.
Megatron-LM's guide for GB200: its row with an all-to-all and without CUDA graphs is bound by the host. torchtitan: issues
1789 and 1993 (from its MFU), batches assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

BASE = (
    "conf=deepseek_v3", "data.path=none", "parallel=single", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0", "plan.imbalance=1",
    "mode=plan",
)  # fmt: skip
FP8, BF16, NO_MTP = ("precision.fp8.backend=deepgemm",), ("precision=bf16",), ("model.mtp_depth=0",)
KIMI = ("model.dense_layers=1", "model.heads=64", "model.experts=384", "model.groups=1", "model.top_groups=1", "model.vocab_size=163840",
        *NO_MTP)  # fmt: skip
MOONLIGHT = ("conf=deepseek_v3_16b", *BASE[1:], "model.vocab_size=163840", "model.dense_width=11264", *NO_MTP, *BF16)
V2 = ("model.hidden=5120", "model.dense_width=12288", "model.expert_width=1536", "model.experts=160", "model.shared_experts=2",
      "model.top_k=6", "model.top_groups=3", "model.vocab_size=102400")  # fmt: skip
FP8_ATTENTION = ("hardware.rates.attention_forward.flops=2920e12", "hardware.rates.attention_backward.flops=2000e12")
SIXTEEN, EIGHT, THIRTY_TWO = [4] * 15 + [1], [8] * 7 + [5], [1, *[2] * 30, 0]
"""Number of layers of every stage."""


@dataclass(frozen=True)
class PublishedJob:
    """One published speed."""

    source: str
    """Laboratory, software and its release."""
    name: str
    overrides: tuple[str, ...]
    tokens_per_second: float
    """Tokens per second and device."""

    @property
    def laboratory(self) -> str:
        """The source without the release."""
        return self.source.rpartition(" ")[0]

    @property
    def kind(self) -> str:
        """The kind of program: tuned, untuned (releases of 2025, or nothing overlapped), native (PyTorch's own parallelism) or
        host-bound."""
        if "all-to-all" in self.name:
            return "host-bound"
        if "Automodel" in self.source or "torchtitan" in self.source:
            return "native"
        return "tuned" if "Megatron-Bridge 26" in self.source or self.source.endswith("2024-12") else "untuned"


def published_jobs() -> Iterator[PublishedJob]:
    """All published jobs, in the order of their sources."""
    yield PublishedJob("DeepSeek HAI-LLM 2024-12", "671B, 2048 H800", DEEPSEEK, 15360 * 4096 / 19.926 / 2048)
    yield from _megatron_bridge()
    yield from _automodel()
    yield from _simumax()
    yield from _later()


def laid_out(
    devices: int, pp: int, ep: int, batch: int, order: str = "1f1b", stages: int = 0, size: int = 1, again: str = "mla_up",
    split: list[int] | None = None, dispatch: str = "deepep", wire: str = "bf16",
) -> tuple[str, ...]:  # fmt: skip
    """The arguments of a layout. stages: number of stages per rank, if the schedule allows several numbers. size:
    sequences per micro-batch. again: what is recomputed."""
    words = [f"parallel.pp={pp}", f"parallel.dp={devices // pp}", f"parallel.ep={ep}", f"batch_size={batch}", f"micro_batch_size={size}",
             f"model.recompute=[{again}]", f"parallel.dispatch={dispatch}", f"parallel.wire={wire}"]  # fmt: skip
    words += [f"parallel.schedule={order}"] * (pp > 1) + [f"parallel.virtual_stages={stages}"] * (stages > 0)
    return (*words, *([f"parallel.split=[{','.join(map(str, split))}]"] if split else []))


OURS = ("conf=deepseek_v3", "data.path=none", "mode=plan", "hardware=h800")
"""DeepSeek's job with this trainer's recipe and software. `python -m train conf=deepseek_v3 mode=plan` plans this
job."""
DEEPSEEK = (
    *OURS, *FP8, "parallel.offload_optimizer=false", "parallel.dispatch=deepep", "plan.imbalance=1", "hardware.rates.across.bandwidth=40.2e9", "hardware.rates.fprop_fp8.seconds=8.3e-6",
    "hardware.rates.fprop_fp8.flops=1700e12", "hardware.rates.fprop_fp8.bandwidth=2.02e12",
)  # fmt: skip
"""The same by DeepSeek's: balanced experts, and DeepGEMM and DeepEP as first released (February 2025), the nearest to the job: the fit of ten
shapes in DeepGEMM's README at a6d97a1 (worst residue 6 %; tests/plan/time/test_rates.py repeats it), and 46 GB/s at EP 64, without what stays on the node.
DualPipe puts 16 stages on 16 ranks, each twice; dualpipev puts 32 stages on them, each once: the same work and bubble a rank."""


def _megatron_bridge() -> Iterator[PublishedJob]:
    def row(release: str, name: str, device: str, speed: float, *words: str) -> PublishedJob:
        form = () if "precision=bf16" in words or words[0] == MOONLIGHT[0] else FP8
        base = () if words[0] == MOONLIGHT[0] else BASE
        overrides = (*base, *form, f"hardware={device}", *words)
        return PublishedJob(f"NVIDIA Megatron-Bridge {release}", name, overrides, speed)

    def wide(order: str = "interleaved", stages: int = 4, split: list[int] | None = SIXTEEN) -> tuple[str, ...]:
        return laid_out(256, 4, 64, 4096, order, stages, split=split)

    flat = laid_out(256, 16, 8, 4096, split=SIXTEEN)
    yield row("25.11", "671B, 256 B200, batch 2048", "b200", 2139, *laid_out(256, 16, 8, 2048, split=SIXTEEN))
    yield row("25.11", "671B, 256 GB200, bf16, no MTP", "gb200_nvl72", 3139, *wide(), *NO_MTP, *BF16)
    eight = laid_out(256, 8, 32, 4096, "interleaved", 4, split=THIRTY_TWO)
    yield row("25.11", "671B, 256 GB200, no MTP", "gb200_nvl72", 4018, *eight, *NO_MTP)
    two = laid_out(256, 2, 32, 4096, "interleaved", 4, split=EIGHT)
    yield row("25.11", "671B, 256 GB300, bf16, no MTP", "gb300_nvl72", 3848, *two, *NO_MTP, *BF16)
    yield row("25.11", "671B, 256 GB300, no MTP", "gb300_nvl72", 4357, *two, *NO_MTP)
    for release, speed in (("26.02", 2689), ("26.02", 2790), ("26.04", 2815)):
        yield row(release, "671B, 256 B200", "b200", speed, *flat)
    overlapped = laid_out(256, 8, 32, 4096, "dualpipev", split=SIXTEEN)
    yield row("26.04", "671B, 256 B200, overlapped", "b200", 3328, *overlapped)
    for release, speed in (("26.02", 2983), ("26.02", 3099), ("26.04", 3131)):
        yield row(release, "671B, 256 B300", "b300", speed, *flat)
    for release, speed in (("26.04", 3456), ("26.06", 3541)):
        yield row(release, "671B, 256 B300, pairs", "b300", speed, *laid_out(256, 8, 8, 4096, size=2))
    for release, speed in (("26.02", 3955), ("26.02", 4021), ("26.04", 4193), ("26.04", 4256)):
        yield row(release, "671B, 256 GB200", "gb200_nvl72", speed, *wide())
    for release, speed in (("26.06", 4969), ("26.06", 4928), ("26.08", 4912), ("26.08", 4735)):
        yield row(release, "671B, 256 GB200, overlapped", "gb200_nvl72", speed, *wide("dualpipev", 0, split=None))
    pairs = laid_out(256, 2, 32, 4096, "interleaved", 8, size=2, split=SIXTEEN)
    for release, speed in (("26.02", 4612), ("26.02", 4691), ("26.04", 4965), ("26.04", 4992)):
        yield row(release, "671B, 256 GB300, pairs", "gb300_nvl72", speed, *pairs)
    for release, batch, speed in (("26.06", 4096, 6338), ("26.06", 15360, 6422), ("26.06", 4096, 6304), ("26.08", 4096, 6288), ("26.08", 4096, 6144)):  # fmt: skip
        words = laid_out(256, 2, 32, batch, "dualpipev", again="")
        yield row(release, f"671B, 256 GB300, batch {batch}", "gb300_nvl72", speed, *words, *FP8_ATTENTION)
    for release, speed in (("26.02", 5072), ("26.04", 5328), ("26.04", 5332), ("26.06", 5372)):
        words = laid_out(256, 4, 64, 4096, "interleaved", 4, size=2, split=SIXTEEN)
        yield row(release, "Kimi K2, 256 GB300", "gb300_nvl72", speed, *words, *KIMI)
    alone = laid_out(16, 1, 8, 1024, size=2, again="")
    yield row("26.08", "Moonlight, 16 H100, natural routing", "h100", 22528, *MOONLIGHT, *alone)
    long = ("seq_len=8192", "model.max_seq_len=8192")
    alone = laid_out(8, 1, 8, 8, again="")
    yield row("26.08", "Moonlight tuned, 8 H100, natural", "h100", 14573, *MOONLIGHT, *alone, *long)


def _automodel() -> Iterator[PublishedJob]:
    for name, devices, pp, ep, stages, batch, model, speed in (
        ("671B, 1024 H100, bf16", 1024, 4, 64, 8, 2048, NO_MTP, 865),
        ("671B, 256 H100, bf16", 256, 4, 64, 8, 512, NO_MTP, 1002),
        ("Kimi K2, 256 H100, bf16", 256, 8, 32, 4, 256, KIMI, 924),
    ):
        words = laid_out(devices, pp, ep, batch, "interleaved", stages, again="layer")
        yield PublishedJob("NVIDIA Automodel 26.06", name, (*BASE, *BF16, "hardware=h100", *words, *model), speed)


def _simumax() -> Iterator[PublishedJob]:
    small = ("model.layers=4", "model.dense_layers=1", *NO_MTP, *BF16)
    milliseconds = {
        4: (603.2, 452.2, 366.6, 282.1),
        8: (1101.7, 771.6, 676.2, 492.6),
        32: (4141.2, 2718.6, 2721.3, 1727.7),
    }
    for count, times in milliseconds.items():
        for (name, model, pp, ep), taken in zip(
            (("V3", (), 1, 8), ("V3", (), 2, 4), ("V2", V2, 1, 8), ("V2", V2, 2, 4)), times, strict=True
        ):
            batch = count * 8 // pp
            words = laid_out(8, pp, ep, batch, again="", dispatch="flat")
            overrides = (*BASE, "hardware=b200", *words, *small, *model)
            speed = batch * 4096 / (taken / 1e3) / 8
            yield PublishedJob("Moore Threads SimuMax 1.2", f"{name}, 8 B200, bf16, pp {pp}, {count}", overrides, speed)


def _later() -> Iterator[PublishedJob]:
    """Jobs that were found after the rates were chosen."""
    deepseek_v2 = (*V2, "model.layers=60", "model.dense_layers=1", *NO_MTP, *BF16)
    words = laid_out(512, 16, 8, 9216, "zbv", dispatch="flat")
    yield PublishedJob(
        "DeepSeek HAI-LLM 2024-05", "V2, H800, bf16", (*BASE, "hardware=h800", *deepseek_v2, *words), 1608
    )

    def row(source: str, name: str, device: str, speed: float, *words: str) -> PublishedJob:
        form = () if "precision=bf16" in words else FP8
        return PublishedJob(f"NVIDIA {source}", name, (*BASE, *form, f"hardware={device}", *words), speed)

    flat = laid_out(256, 16, 8, 2048, split=SIXTEEN)
    yield row("Megatron-Bridge 25.09", "671B, 256 B200, tokens dropped", "b200", 2159, *flat)
    eight = laid_out(256, 8, 32, 2048, "interleaved", 4, split=THIRTY_TWO)
    yield row("Megatron-Bridge 25.09", "671B, 256 GB200, tokens dropped", "gb200_nvl72", 2835, *eight)
    four = laid_out(256, 4, 64, 2048, "interleaved", 4, split=SIXTEEN)
    yield row("dgxc-benchmarking 25.11", "671B, 256 GB200, bf16", "gb200_nvl72", 2960, *four, *BF16)
    alone = laid_out(256, 8, 32, 2048, "interleaved", 4, split=THIRTY_TWO, dispatch="flat")
    yield row("Megatron-LM guide", "671B, 256 GB200, all-to-all", "gb200_nvl72", 1981, *alone, *NO_MTP)
    yield row("Megatron-LM guide", "671B, 256 GB200, DeepEP and graphs", "gb200_nvl72", 3325, *eight, *NO_MTP)
    small = ("conf=deepseek_v3_16b", *BASE[1:], *NO_MTP, *BF16)
    for number, device, speed, ep in ((1789, "h100", 11545, 8), (1993, "b200", 22600, 8), (1993, "b200", 25800, 1)):
        words = (*small, f"hardware={device}", *laid_out(8, 1, ep, 512, size=4, dispatch="flat"))
        yield PublishedJob(f"Meta torchtitan {number}", f"16B, 8 {device.upper()}, natural, ep {ep}", words, speed)
