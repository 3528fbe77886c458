"""Folders of DeepSeek-V3.2 and of GLM-5, 5.1 and 5.2 (sparse attention), as transformers writes and reads them.

Logits to 1e-5, as in tests/hf/test_variants.py: fp32 on both sides, products that are summed in another order. With few heads many scores
are exactly 0, and of equal scores transformers takes any; 16 heads leave none.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config, GlmMoeDsaConfig

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model, SparseAttention
from tests.hf.small import (
    MODEL,
    SEQ_LEN,
    SMALL,
    export_model,
    random_tensors,
    read_folder,
    released_config,
    tokens,
    write_folder,
)
from tests.layouts import run_layout
from tests.model.parity import randomise
from tests.small import arguments
from tests.test_layouts import everything
from train.checkpoint.stored_weights import load_hf_model
from train.checkpoint.trained_with import require_model
from train.data.tokenizer import load_tokenizer
from train.hf.config import read_model
from train.hf.families import HARMLESS
from train.hf.folder import open_model
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.loop.start import check_start, own_start
from train.model.count import count_parameters
from train.model.deepseek import DeepSeekV3

torch.set_num_threads(1)
SHAPE = MODEL | {"layers": 4, "max_seq_len": 64}
FAMILIES = {
    "V3.2": (DeepseekV32Config, {}, {}, False, ""),
    "V3.2 with YaRN": (
        DeepseekV32Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
        {},
        False,
        "",
    ),
    "GLM-5": (
        GlmMoeDsaConfig,
        {"rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1},
        {"groups": 1, "top_groups": 1},
        True,
        "",
    ),
    "GLM-5.2, types": (GlmMoeDsaConfig, {"indexer_types": ["full", "shared", "full", "shared"]}, {}, True, "FSFS"),
    "GLM-5.2, pattern": (GlmMoeDsaConfig, {"index_topk_pattern": "FFSS"}, {}, True, "FFSS"),
    "GLM-5.2, rule": (GlmMoeDsaConfig, {"index_topk_freq": 2, "index_skip_topk_offset": 2}, {}, True, "FFSF"),
}


def theirs_of(family: str):
    kind, changes, *_ = FAMILIES[family]
    config = kind(
        **SMALL
        | {
            "vocab_size": 64,
            "num_hidden_layers": 4,
            "q_lora_rank": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "max_position_embeddings": 64,
            "attn_implementation": "eager",
            "index_n_heads": 16,
            "index_head_dim": 12,
            "index_topk": 6,
        }
        | changes
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, 0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_both_ways(tmp_path, family):
    _, _, _, interleaved, pattern = FAMILIES[family]
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path / "in")
    model = read_model(tmp_path / "in")
    assert model.sparse == SparseAttention(heads=16, head_dim=12, top_k=6, interleaved=interleaved, pattern=pattern)
    _, ours, _ = load_hf_model(tmp_path / "in")
    tokens_BT = tokens(model)
    with torch.no_grad():
        expected, got = theirs(tokens_BT).logits, ours.logits(tokens_BT)
        assert expected.std() > 0.1
        worst = (got - expected).abs().max().item()
        print(f"{family}: worst difference of logits {worst:.2g}")
        assert worst < 1e-5
        dense = replace(model, sparse=replace(model.sparse, top_k=SEQ_LEN))
        assert dense != model
    name = "deepseek_v32" if family.startswith("V3.2") else "glm_moe_dsa"
    export_model(tmp_path, model, ours, family=name)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens_BT).logits, expected, atol=1e-5, rtol=0)
    assert read_model(tmp_path / "out") == model
    before, after = read_folder(tmp_path / "in"), read_folder(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_published_file_of_glm_5_is_the_model_of_its_recipe(tmp_path):
    """744B parameters by its report, without MTP; the modules on the meta device have as many as are counted."""
    published = GlmMoeDsaConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 1000000}, indexer_rope_interleave=True
    )
    published.save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    more = {"architectures": ["GlmMoeDsaForCausalLM"], "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(body | more))
    config = compose("conf=glm_5_tune", "init_from=GLM", "data.path=CHATS", "data.tokenizer=GLM")
    model = config.model
    assert replace(read_model(tmp_path), recompute=model.recompute, init_std=model.init_std) == model
    whole = DeepSeekV3.whole(
        model, HighPrecision(torch.bfloat16, build_kernels("cpu")), seq_len=config.seq_len, device="meta"
    )
    counts = count_parameters(model)
    assert sum(p.numel() for p in whole.parameters()) == counts.total + counts.mtp
    assert counts.total == 743_911_199_232
    assert sum(p.numel() for name, p in whole.named_parameters() if name.startswith("mtp.")) == counts.mtp
    assert counts.active / 1e9 == pytest.approx(40, abs=2)
    layer = list(whole.layers.values())[3].attention.indexer
    assert sum(p.numel() for p in layer.parameters()) == 32 * 128 * 2048 + 128 * 6144 + 2 * 128 + 32 * 6144


def test_the_form_of_the_indexers_rope_is_said_where_a_file_or_transformers_does_not_tell_it(tmp_path, capsys):
    theirs_of("GLM-5").save_pretrained(tmp_path / "in")
    assert any("lacks indexer_rope_interleave" in note for note in open_model(tmp_path / "in")[2])
    model, ours, _ = load_hf_model(tmp_path / "in")
    export_model(tmp_path, model, ours, family="deepseek_v32")
    assert "transformers ignores indexer_rope_interleave and uses false" in capsys.readouterr().out
    assert open_model(tmp_path / "out")[2] == [] and read_model(tmp_path / "out") == model


WRONG = {
    "index_topk": [None, 0, "6", 6.0],
    "index_n_heads": [None, -1],
    "index_head_dim": [4, 0],
    "layer_types": [["full_attention"] * 4],
    "indexer_rope_interleave": ["yes", 1],
    "indexer_types": [["shared", "full", "full", "full"], ["full"] * 3, ["full", "half", "full", "full"], 4],
    "index_topk_pattern": ["SFFF", "FF", 4, True],
    "num_hidden_layers": ["4", 2.5, None, 10**18],
    "index_topk_freq": [2.5, "2"],
    "mlp_bias": [True],
    "rope_interleave": [False],
    "qk_head_dim": [25],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_field_is_refused(tmp_path, key, value):
    theirs_of("GLM-5").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    body = json.loads(path.read_text()) | {"architectures": ["GlmMoeDsaForCausalLM"]}
    if key.startswith("index_topk_") or key == "indexer_types":
        body.pop("indexer_types", None)
    read_before = path.write_text(json.dumps(body))
    assert read_before and read_model(tmp_path).sparse.heads == 16
    path.write_text(json.dumps(body | {key: value}))
    with pytest.raises(UserError):
        read_model(tmp_path)


def other(value):
    """Another value of a field of config.json."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return value + value
    return {**value, "rope_type": "linear"} if isinstance(value, dict) else 3


@pytest.mark.parametrize("family", ["V3.2 with YaRN", "GLM-5", "GLM-5.2, types"])
def test_no_field_of_transformers_is_passed_over(tmp_path, family):
    """Each field of its config.json with another value makes another model, or is refused; else the list of harmless fields says why."""
    theirs = theirs_of(family)
    theirs.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    body = json.loads(path.read_text()) | {"architectures": [type(theirs).__name__]}
    path.write_text(json.dumps(body))
    before = read_model(tmp_path)
    for name, value in body.items():
        path.write_text(json.dumps(body | {name: other(value)}))
        try:
            same = read_model(tmp_path) == before
        except UserError as error:
            same = False
            assert error.value == path and error.cure, name
        assert not same or name in HARMLESS or name == "head_dim", name  # transformers sets head_dim aside, too


def test_fields_that_are_honoured_and_that_mislead(tmp_path):
    theirs_of("GLM-5").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    body = json.loads(path.read_text()) | {"architectures": ["GlmMoeDsaForCausalLM"]}

    def read(**changes) -> Model:
        path.write_text(json.dumps({key: value for key, value in (body | changes).items() if value is not None}))
        return read_model(tmp_path)

    plain = read()
    assert read(indexer_rope_interleave=False).sparse.interleaved is False and plain.sparse.interleaved is True
    assert read(index_topk=9).sparse.top_k == 9 and read(index_n_heads=5).sparse.heads == 5
    assert read(head_dim=192) == plain  # GLM-5.2 has such a one, and transformers sets it aside
    assert read(indexer_types=None, index_topk_pattern="FSSF").sparse.pattern == "FSSF"
    with pytest.raises(UserError, match="must be the same"):
        read(index_topk_pattern="FSSF")


def test_the_other_families_have_no_such_field(tmp_path):
    model = Model(**MODEL)
    write_folder(tmp_path / "a", model, random_tensors(model, "fp32"), index_topk=2048)
    with pytest.raises(UserError, match="unknown fields, which may change the model: index_topk"):
        read_model(tmp_path / "a")


def test_fp8_blocks_of_an_indexer_are_read(tmp_path):
    model = Model(**MODEL, sparse=SparseAttention(heads=2, head_dim=12, top_k=6))
    found = random_tensors(model, "fp8")
    assert "model.layers.0.self_attn.indexer.wq_b.weight_scale_inv" in found
    assert found["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype == torch.bfloat16
    own = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    sizes = {"index_n_heads": 2, "index_head_dim": 12, "index_topk": 6}
    folder = write_folder(tmp_path / "a", model, found, **own, **sizes)
    assert json.loads((folder / "config.json").read_text()).keys() > released_config(model).keys()
    read, ours, _ = load_hf_model(folder)
    assert read.sparse == model.sparse and ours.layers["0"].attention.indexer.q.weight.isfinite().all()


@pytest.fixture
def dense_folder(tmp_path):
    """The export of a dense run of two steps."""
    run_layout(tmp_path, "dense", 1, "steps=2", "checkpoint.every=0", "model.init_std=0.1")
    from train.export.run import export

    export(
        compose(*arguments(tmp_path, "name=dense", "mode=export", f"export.to={tmp_path / 'V3'}", "export.dtype=fp32"))
    )
    return tmp_path / "V3"


def test_dense_weights_start_a_warmup_with_fresh_indexers(tmp_path, dense_folder):
    words = [
        *("model.sparse.heads=2", "model.sparse.head_dim=12", "model.sparse.top_k=6", "model.init_std=0.1"),
        *("optim.index_warmup=true", "optim.bias_speed=[{value: 0}]", "steps=2", "checkpoint.every=0"),
    ]
    tokenizer = load_tokenizer(str(dense_folder))
    source = f"init_from={dense_folder}"
    notes = check_start(compose(*arguments(tmp_path, *words, source, f"data.tokenizer={dense_folder}")), tokenizer)[1]
    assert any("initialises the indexers" in note for note in notes)
    for name, where in (("folder", source), ("run", f"init_from={tmp_path / 'runs' / 'dense'}")):
        run_layout(tmp_path, name, 1, *words, where, f"data.tokenizer={dense_folder}")
        before, after = everything(tmp_path, "dense", 2), everything(tmp_path, name, 2)
        masters = {key for key in before if key.startswith("master.")}
        assert {key for key in masters if not torch.equal(before[key], after[key])} == set()
        indexers = {key for key in after if key.startswith("master.") and key not in masters}
        assert indexers and all(".indexer." in key and after[key].isfinite().all() for key in indexers)
    first, second = (everything(tmp_path, name, 2) for name in ("folder", "run"))
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("master."))


def test_an_adapter_gets_no_fresh_indexers(tmp_path, dense_folder):
    """No step of its run would train them."""
    words = ["model.sparse.heads=2", "model.sparse.head_dim=12", "adapter=lora", "optim.bias_speed=[{value: 0}]"]
    tokenizer = load_tokenizer(str(dense_folder))
    for source, start in ((dense_folder, check_start), (tmp_path / "runs" / "dense", own_start)):
        config = compose(*arguments(tmp_path, *words, f"init_from={source}", f"data.tokenizer={dense_folder}"))
        with pytest.raises(UserError) as error:
            start(config, tokenizer)
        assert "set model.sparse.heads=0" in error.value.cure
    meta = {"config": {"model": {"sparse": {"heads": 0, "head_dim": 64}}}}  # of a dense model the width is not read
    require_model(compose(*arguments(tmp_path)), tmp_path, meta)
