"""Weights in and out: slices only, renamed checkpoints, memory, titles, GGUF, export round trip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import distributed
from model_zoo import run_layers, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_recsys.errors import UserError
from ds_recsys.models import ModelBuilder, Weights, open_weights, recommender_config, with_title_items


@pytest.fixture
def pretrained(tmp_path):
    """A tiny Llama of 70 tokens in several files, as on the hub."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=70, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "llm", max_shard_size="20KB")
    return tmp_path / "llm"


def test_a_stage_reads_its_own_tensors_only(pretrained):
    weights = open_weights(pretrained)
    asked = []
    weights.read = lambda name, read=weights.read: asked.append(name) or read(name)
    builder = ModelBuilder(recommender_config(weights.config, 49), weights)
    layer = builder.specs()[2].build()
    assert asked and all(name.startswith("model.layers.1.") for name in asked)
    stored = AutoModelForCausalLM.from_pretrained(pretrained).state_dict()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, stored[name])
    assert not builder.initialised
    for spec in (builder.specs()[0], builder.specs()[-1]):
        spec.build()
    assert builder.initialised == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }  # other vocabulary: nothing else is random
    assert not any("embed_tokens" in name or "lm_head" in name for name in asked)


def test_num_layers_keeps_the_first(pretrained):
    weights = open_weights(pretrained)
    builder = ModelBuilder(recommender_config(weights.config, 49, num_layers=2), weights)
    names = {n for s in builder.specs() for n in s.build().state_dict()}
    assert any("layers.1." in n for n in names) and not any("layers.2." in n for n in names)


def test_missing_and_misshapen_tensors_are_refused(pretrained):
    file = pretrained / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = pretrained / index["weight_map"].pop(name)
    file.write_text(json.dumps(index))
    weights = open_weights(pretrained)
    with pytest.raises(UserError, match=f"has no '{name}'"):
        ModelBuilder(recommender_config(weights.config, 49), weights).specs()[2].build()
    config = recommender_config(weights.config, 49)
    config.intermediate_size = 48
    with pytest.raises(UserError, match="has shape"):
        ModelBuilder(config, weights).specs()[1].build()
    shard.unlink()
    with pytest.raises(UserError, match="incomplete"):
        open_weights(pretrained)


@pytest.mark.parametrize("what", ["bin", "empty", "file", "hub"])
def test_unusable_sources_are_refused_in_one_line(tmp_path, what, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = {"file": tmp_path / "x.pt", "hub": "no org/no model"}.get(what, tmp_path)
    (tmp_path / ("pytorch_model.bin" if what == "bin" else "x.pt")).touch()
    said = {
        "bin": "save it again as safetensors",
        "empty": "holds no",
        "file": "is a file",
        "hub": "is no local folder",
    }[what]
    with pytest.raises(UserError, match=said) as error:
        open_weights(path)
    assert "\n" not in str(error.value)


def test_checkpoint_of_the_bare_trunk_and_of_unstacked_experts(tmp_path):
    """GPT-2's hub files lack `transformer.`; Mixtral's hold one tensor per expert, the model one for all."""
    for model_type in ("gpt2", "mixtral"):
        config = tiny_config(model_type, pad_token_id=None)
        model = AutoModelForCausalLM.from_config(config)
        (model.transformer if model_type == "gpt2" else model).save_pretrained(tmp_path / model_type)
        stored = load_file(tmp_path / model_type / "model.safetensors")
        own = model.state_dict()
        assert not stored.keys() <= own.keys()
        builder = ModelBuilder(recommender_config(config, 49), Weights(tmp_path / model_type))
        for spec in builder.specs()[1:-1]:
            for name, value in spec.build().state_dict().items():
                assert name in builder.initialised or torch.equal(value, own[name]), name
        assert builder.initialised <= {"lm_head.weight"}


def test_title_embeddings(pretrained, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "star": 1, "wars": 2, "heat": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    titles = ["star wars", "heat", None]
    weights = with_title_items(open_weights(pretrained), titles, tokenizer=tokenizer, cache_dir=tmp_path)
    table = AutoModelForCausalLM.from_pretrained(pretrained).model.embed_tokens.weight
    builder = ModelBuilder(recommender_config(weights.config, 3), weights)
    got = builder.specs()[0].build().get_parameter("model.embed_tokens.weight")
    pair = (table[1] + table[2]) / 2
    centred = torch.stack([pair, table[3]]) - (pair + table[3]) / 2
    centred *= weights.config.initializer_range / centred.std()
    torch.testing.assert_close(got, torch.cat([torch.zeros(1, 32), centred, torch.zeros(1, 32)]))
    assert not builder.initialised
    again = with_title_items(open_weights(pretrained), titles, cache_dir=tmp_path)  # from the file: no tokenizer needed
    assert again.item_table == weights.item_table
    with pytest.raises(UserError, match="no tokenizer"):
        with_title_items(open_weights(pretrained), ["other"], cache_dir=tmp_path)
    wrong = ModelBuilder(recommender_config(weights.config, 5), weights)
    with pytest.raises(UserError, match="has shape"):
        wrong.specs()[0].build()


CHILD = """
import gc, sys
import torch
from transformers import AutoConfig
from ds_recsys.models import ModelBuilder, Weights, recommender_config

def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024

weights = Weights(sys.argv[1])
builder = ModelBuilder(recommender_config(weights.config, 1000), weights)
specs = builder.specs()
builder.source
cut = len(specs) // 2
specs = specs[:cut] if sys.argv[2] == "0" else specs[cut:]
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts counting here
before = status("VmRSS")
layers = [s.build() for s in specs]
peak = status("VmHWM") - before
sizes = [p.numel() * 4 for l in layers for p in l.parameters()]
print(peak, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("stage", [0, 1])
def test_peak_memory_while_loading(tmp_path_factory, stage):
    """At most 1.2 x the stage's own parameters plus one tensor; the file holds 2 stages and another vocabulary."""
    folder = tmp_path_factory.getbasetemp() / "big"
    if not folder.exists():
        config = tiny_config(
            "llama", vocab_size=2000, hidden_size=768, intermediate_size=3072, num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=8, head_dim=96, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
        folder.mkdir()
        config.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors")
        assert sum(t.numel() * 4 for t in tensors.values()) > 380e6
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(stage)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    peak, own, largest = map(int, done.stdout.split()[-3:])
    print(f"stage {stage}: peak {peak / 1e6:.0f} MB, own {own / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert own > 150e6
    assert peak <= 1.2 * own + largest


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2_moe"])
def test_export_round_trip(model_type, tmp_path):
    _export_round_trip(model_type=model_type, out=str(tmp_path / "out"))


@distributed(pipe=2, data=1)
def _export_round_trip(model_type, out):
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    from ds_recsys.models import RecommenderPipe, export

    config = recommender_config(tiny_config(model_type), 49)
    pipe = RecommenderPipe(config, PipeDataParallelTopology(2, 1), seed=4).eval()
    ids = [f"item-{i}" for i in range(1, 50)]
    with pytest.raises(UserError, match="3 item ids for a model of 49"):
        export(pipe, out, item_ids=ids[:3])
    export(pipe, out, item_ids=ids, titles=["a title"] * 49, extra_config={"recsys_note": 1})
    export(pipe, out, item_ids=ids, titles=["a title"] * 49)  # over an older one
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    shards = [load_file(f).keys() for f in sorted(Path(out).glob("*.safetensors"))]
    assert len(shards) == 2 and not shards[0] & shards[1]  # a tied table is written once
    assert not list(Path(out).parent.glob(".*"))
    builder = ModelBuilder(config, seed=4)
    specs = builder.specs()
    layers = [s.build().eval() for s in specs]
    x = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    want = builder.logits(run_layers(specs, layers, x), layers, False)
    assert torch.equal(whole(input_ids=x).logits, want)
    assert set(pipe.hf_names().values()) <= set(whole.state_dict())
    again = ModelBuilder(config, open_weights(out))  # an export loads whole, item table included
    for spec, layer in zip(again.specs(), layers, strict=True):
        for name, value in spec.build().state_dict().items():
            assert torch.equal(value, layer.state_dict()[name])
    assert not again.initialised
