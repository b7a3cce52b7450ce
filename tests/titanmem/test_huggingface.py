"""Checkpoints of other makers give transformers' logits, and a folder that cannot be served says why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_model import tiny_folder
from titanmem.cache import Cache
from titanmem.checkpoint import base_hash, decoder_hash
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.folder import check_folder, load_base, load_decoder, save_memory
from titanmem.spec import MemorySpec

SAME = 1e-4
"""Float32 through three layers, summed in other orders; logits are of size 1 to 10."""
WINDOW = 16
VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-head": ("Llama", {"head_dim": 16}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9e3}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "beta_fast": 8}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, **MSCALE}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-3}),
    "qwen2-sliding": ("Qwen2", {**SLIDING, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3", {"attention_bias": True, "head_dim": 16, **SLIDING}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer to share out than to work out, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model of transformers, every weight and bias away from its start value."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.dim() == 2 else 0.5))
            if "norm" in name:
                weight.add_(1.0)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def changed(folder: Path, **values: Any) -> Path:
    """The folder with other values in its config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def served(folder: Path, window: int = WINDOW) -> Decoder:
    """As the server loads it, with an operator's window."""
    knobs = {"window": window, "chunk_size": min(16, window)}
    return load_decoder(folder, DecoderConfig.load(folder).overridden(knobs))


def tokens_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def by_blocks(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of whole rows."""
    x, _ = decoder.lower_blocks(tokens)
    read = torch.zeros(*tokens.shape, 0)
    return decoder.logits(decoder.upper_blocks(x, read), read, torch.zeros(VOCABULARY, 0))


def by_steps(decoder: Decoder, tokens: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Logits of one conversation: prefilled in pieces, then token by token."""
    cache, outs, start = Cache(decoder.config, 1), [], 0
    for cut in [*cuts, *range(cuts[-1] + 1, tokens.shape[1] + 1)]:
        part = tokens[:, start:cut]
        cache.begin(torch.tensor([part.shape[1]]), part.shape[1])
        x, query = decoder.lower_cached(part, cache)
        read = torch.zeros(1, part.shape[1], query.shape[-1])
        out = decoder.upper_cached(x, read, cache)
        cache.advance()
        outs.append(decoder.logits(out, read, torch.zeros(VOCABULARY, query.shape[-1])))
        start = cut
    return torch.cat(outs, 1)


def wanted(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    kind, options = MODELS[name]
    model = reference(kind, **options)
    decoder = served(saved(model, tmp_path))
    assert decoder.config.memory.window == WINDOW
    for count in (5, WINDOW - 1, WINDOW):  # below the window attention is full in every kind
        tokens = tokens_of(count)
        target = wanted(model, tokens)
        assert 1 < target.abs().max() < 100
        assert (by_blocks(decoder, tokens) - target).abs().max() < SAME, count
        assert (by_steps(decoder, tokens, (3,)) - target).abs().max() < SAME, count
    wide = served(tmp_path, 64)  # clipped to the checkpoint's own where it has one
    assert wide.config.memory.window == (16 if "sliding" in name or name == "qwen3-biased" else 64)
    tokens = tokens_of(64)
    target = wanted(model, tokens)
    assert (by_blocks(wide, tokens) - target).abs().max() < SAME
    assert (by_steps(wide, tokens, (16, 32, 40)) - target).abs().max() < SAME


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("count", [WINDOW + 1, 2 * WINDOW, 3 * WINDOW, 61])
def test_above_the_window_logits_are_those_of_a_sliding_model(kind, count, tmp_path):
    slides = {"sliding_window": WINDOW} if kind == "Mistral" else SLIDING
    model = reference(kind, **slides)
    decoder = served(saved(model, tmp_path))
    tokens = tokens_of(count)
    target = wanted(model, tokens)
    if count % WINDOW == 0:
        assert (by_blocks(decoder, tokens) - target).abs().max() < SAME
    for cuts in ((1,), (WINDOW - 1, WINDOW + 1)):
        assert (by_steps(decoder, tokens, cuts) - target).abs().max() < SAME


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_model_with_full_attention_is_served_as_if_it_slid(kind, tmp_path):
    """The window is the operator's: the same weights in transformers with that sliding_window say the same."""
    model = reference(kind, head_dim=8)
    decoder = served(saved(model, tmp_path))
    twin, slides = ("Mistral", {"sliding_window": WINDOW}) if kind == "Llama" else (kind, SLIDING)
    sliding = reference(twin, head_dim=8, **slides)
    sliding.load_state_dict(model.state_dict())
    tokens = tokens_of(3 * WINDOW)
    target = wanted(sliding, tokens)
    assert (by_blocks(decoder, tokens) - target).abs().max() < SAME
    assert (by_steps(decoder, tokens, (WINDOW,)) - target).abs().max() < SAME
    assert (wanted(model, tokens) - target).abs().max() > 100 * SAME, "the window matters here"


def test_older_files_say_the_same_of_rotary_positions(tmp_path):
    """`rope_theta` and `rope_scaling` beside each other, as before transformers 5."""
    model = reference("Llama", rope_parameters=LLAMA3)
    saved(model, tmp_path)
    new = DecoderConfig.load(tmp_path)
    for kind in ("type", "rope_type"):
        scaling = {name: value for name, value in LLAMA3.items() if name not in ("rope_type", "rope_theta")}
        old = {"rope_theta": 5000.0, "rope_scaling": {**scaling, kind: "llama3"}, "rope_parameters": ...}
        assert DecoderConfig.load(changed(tmp_path, **old)) == new
    plain = DecoderConfig.load(changed(tmp_path, rope_scaling=None))
    assert (plain.rope_theta, plain.rope_scaling) == (5000.0, None)


def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path):
    saved(reference("Mistral"), tmp_path)
    config = DecoderConfig.load(changed(tmp_path, sliding_window=..., head_dim=..., rope_parameters=...))
    assert (config.window_max, config.head_dim, config.rope_theta) == (4096, 8, 10000.0)
    assert DecoderConfig.load(changed(tmp_path, sliding_window=None)).window_max == 65536
    bare = {"model_type": "llama", "num_key_value_heads": ..., "head_dim": None, "tie_word_embeddings": ...}
    config = DecoderConfig.load(changed(tmp_path, **bare))
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (4, False)
    other = {"model_type": "qwen3", "head_dim": ..., "num_key_value_heads": None}
    config = DecoderConfig.load(changed(tmp_path, **other))
    assert (config.head_dim, config.num_key_value_heads) == (128, 4)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({}, None),
        ({"use_sliding_window": True}, None),  # max_window_layers is 28, more than there are
        ({"use_sliding_window": True, "max_window_layers": 2}, 32),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 3}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 2]}, 32),
    ],
)
def test_a_qwen_slides_where_its_layers_do(values, window, tmp_path):
    folder = saved(reference("Qwen2"), tmp_path)
    given = {"layer_types": ..., "sliding_window": 32, "max_window_layers": ..., **values}
    config = DecoderConfig.load(changed(folder, **given))
    assert config.window_max == (window or 65536)
    assert config.memory.window == min(window or 256, 256), "max_position_embeddings is 256"
    assert config.overridden({"window": 64, "chunk_size": 64}).memory.window == min(window or 64, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_float32_once_loaded(dtype, tmp_path):
    model = reference("Llama").to(dtype)
    decoder = served(saved(model, tmp_path))
    assert {tensor.dtype for tensor in decoder.state_dict().values()} == {torch.float32}
    tokens = tokens_of(WINDOW)
    rounded = reference("Llama")  # .float() of the other would keep its rotary frequencies rounded too
    rounded.load_state_dict(model.float().state_dict())
    assert (by_blocks(decoder, tokens) - wanted(rounded, tokens)).abs().max() < SAME


def test_shards_are_one_checkpoint_and_each_is_named(tmp_path):
    model = reference("Qwen2", tie_word_embeddings=True)
    folder = saved(model, tmp_path, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    tokens = tokens_of(WINDOW)
    assert (by_blocks(served(folder), tokens) - wanted(model, tokens)).abs().max() < SAME
    name, data = base_hash(folder), shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ModelFolderError, match=rf"{shards[1].name} is missing, which .*index"):
        load_decoder(folder)
    save_file({"w": torch.zeros(2)}, shards[1])
    with pytest.raises(ModelFolderError, match=rf"{shards[1].name}: missing tensors .'model\.layers"):
        load_decoder(folder)
    shards[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert base_hash(folder) != name
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelFolderError, match=r"is no \.safetensors file of the folder"):
        load_decoder(folder)
    index.write_text("{}")
    with pytest.raises(ModelFolderError, match="weight_map must name"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma': this release reads titanmem_llama, llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling of type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling of type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "names no factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' weights are not read"),
        ({"num_attention_heads": ...}, "num_attention_heads = None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7: must be even"),
        ({"attention_bias": "yes"}, "qkv_bias = 'yes'"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"hidden_size": 64}, r"model\.embed_tokens\.weight has shape \[96, 32\], config.json asks for \[96, 64\]"),
        ({"num_hidden_layers": 4}, r"model\.safetensors: missing tensors .'model\.layers\.3"),
        ({"num_hidden_layers": 2}, r"model\.safetensors: .*foreign tensors .'model\.layers\.2"),
        ({"attention_bias": True}, r"missing tensors .'model\.layers\.0\.self_attn\.k_proj\.bias'"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(change, said, tmp_path):
    folder = changed(saved(reference("Llama"), tmp_path), **change)
    with pytest.raises(ModelFolderError, match=said) as caught:
        load_decoder(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(ModelFolderError, match=said):
        check_folder(folder)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    folder = saved(reference("Llama"), tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # as files of 2023 have
    save_file({**tensors, old: torch.zeros(4)}, path)
    load_decoder(folder)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, path)
    with pytest.raises(ModelFolderError, match=r"model\.norm\.weight is I8"):
        load_decoder(folder)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight holds a value that is not finite"):
        load_decoder(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is missing.*pytorch_model\.bin is there"):
        load_decoder(folder)


SPEC = MemorySpec(
    d_nltm=32, key_dim=16, value_dim=16, code_width=512, code_active=8, conv=4, chunk_size=16, window=WINDOW
)


def test_a_memory_lies_beside_the_checkpoint_and_comes_back(tmp_path):
    folder = saved(reference("Llama"), tmp_path)
    alone, base = base_hash(folder), decoder_hash(folder)
    torch.manual_seed(3)
    trained = load_base(folder, SPEC, 2)
    assert not any(tensor.is_meta for tensor in trained.state_dict().values())
    with torch.no_grad():
        trained.memory.pointer.weight.normal_()
    save_memory(trained.memory, 2, folder)
    assert decoder_hash(folder) == base
    assert base_hash(folder) != alone
    assert sorted(load_file(folder / "memory.safetensors"))[0].startswith("memory.")
    decoder = load_decoder(folder)
    assert (decoder.config.remembers, decoder.config.memory_layer, decoder.config.memory) == (True, 2, SPEC)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
    assert check_folder(folder) == len(load_file(folder / "model.safetensors")) + len(
        trained.memory.state_dict()
    )
    tokens, read = tokens_of(WINDOW), torch.randn(1, WINDOW, 16)
    values = decoder.memory.vocabulary_values(decoder.embed_tokens.weight)
    x, _ = decoder.lower_blocks(tokens)
    out = decoder.upper_blocks(x, read)
    assert (decoder.logits(out, read, values) - wanted(reference("Llama"), tokens)).abs().max() > 0.1
    save_memory(load_base(folder, SPEC, 1).memory, 1, folder)  # another one in its place
    assert load_decoder(folder).config.memory_layer == 1


def test_a_memory_that_does_not_fit_is_refused(tmp_path):
    folder = saved(reference("Llama"), tmp_path / "one")
    with pytest.raises(ModelFolderError, match="memory_layer = 3: must be from 1 to 2"):
        load_base(folder, SPEC, 3)
    memory = load_base(folder, SPEC, 1).memory
    save_memory(memory, 1, folder)
    path, weights = folder / "titanmem.json", folder / "memory.safetensors"
    document = json.loads(path.read_text())
    for change, said in (
        ({"base": "0" * 32}, r"titanmem\.json: a memory for base 0000.*this checkpoint is"),
        ({"format": 2}, r"titanmem\.json: format = 2"),
        ({"memory_layer": 3}, r"titanmem\.json: memory_layer = 3"),
        (
            {"memory": {**document["memory"], "key_dim": 8}},
            r"memory\.safetensors: memory\.\w+ .*titanmem\.json asks",
        ),
        ({"memory": {**document["memory"], "new": 1}}, r"titanmem\.json: memory\.new: unknown"),
        ({"memory": None}, r"titanmem\.json: "),
    ):
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(ModelFolderError, match=said):
            load_decoder(folder)
    path.write_text(json.dumps(document))
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "memory.w1"}, weights)
    with pytest.raises(ModelFolderError, match=r"memory\.safetensors: missing tensors .'memory\.w1'"):
        load_decoder(folder)
    weights.unlink()
    with pytest.raises(
        ModelFolderError, match=r"memory\.safetensors is missing, which belongs to titanmem\.json"
    ):
        load_decoder(folder)
    save_file(tensors, weights)
    wide = saved(reference("Llama", hidden_size=64), tmp_path / "two")
    with pytest.raises(ModelFolderError, match="a memory of width 32"):
        save_memory(memory, 1, wide)
    own = tiny_folder(tmp_path / "own")
    with pytest.raises(ModelFolderError, match="has its memory among its weights"):
        save_memory(memory, 1, own)
    for file in (path, weights):
        file.rename(own / file.name)
    with pytest.raises(ModelFolderError, match=r"titanmem\.json: this checkpoint has a memory of its own"):
        load_decoder(own)


def test_a_memory_sees_no_more_than_the_checkpoint(tmp_path):
    folder = saved(reference("Mistral", sliding_window=WINDOW), tmp_path)
    decoder = load_base(folder, replace(SPEC, window=64, chunk_size=64), 1)
    assert (decoder.config.memory.window, decoder.config.memory.chunk_size) == (WINDOW, WINDOW)
    save_memory(decoder.memory, 1, folder)
    assert load_decoder(folder).config.memory.window == WINDOW
