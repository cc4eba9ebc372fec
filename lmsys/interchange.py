"""A model and its tokenizer in Hugging Face's Llama format, there and back.

Our model is a Llama (Touvron et al., arXiv 2302.13971, section 2.2) with two differences of layout. Q, K and V are one
matrix here. And RoPE rotates neighbours (2i, 2i+1) of a head here, elements i and i + D/2 there: the rows of Q and K of
each head are put in the order 0, 2, 4, ..., 1, 3, 5, ..., which changes no score, as both are permuted alike.

Import takes what our model can hold: no biases, as many key heads as query heads, no RoPE scaling, RMSNorm's eps of
1e-5, a byte-level tokenizer with GPT-2's pattern that ends texts with <|endoftext|>. Everything else is refused by
name. Weights in bf16 or fp16 become fp32. Nothing is unpickled, and shapes are compared with the config before a tensor
is read. Both directions write a folder that appears whole or not at all. A vocabulary that is padded beyond the
tokenizer's stays so: our generation never samples the padding; transformers' may.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmsys.config import END_OF_TEXT, ModelConfig, PipelineConfig, TokenizerConfig, read_json, require
from lmsys.data.tokenizer import Tokenizer
from lmsys.model import TransformerLM
from lmsys.records import flush, naming, write_json
from lmsys.train import checkpoint

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_EPS = 1e-5  # of our RMSNorm
_LONGEST = 2**20  # tokens of context that an imported model may have: RoPE's tables are held in memory for each
_FLOATS = ("F32", "F16", "BF16")


def _weights(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(our name, their names, the shape of each of theirs) of every weight. One by one: a config may say billions."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    layer_weights = (
        ("ln1", ("input_layernorm",), (d,)),
        ("attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (d, d)),
        ("attn.output_proj", ("self_attn.o_proj",), (d, d)),
        ("ln2", ("post_attention_layernorm",), (d,)),
        ("ffn.w1", ("mlp.gate_proj",), (f, d)),
        ("ffn.w3", ("mlp.up_proj",), (f, d)),
        ("ffn.w2", ("mlp.down_proj",), (d, f)),
    )
    yield "token_embeddings.weight", ("model.embed_tokens.weight",), (v, d)
    yield "ln_final.weight", ("model.norm.weight",), (d,)
    if not config.tie_embeddings:  # else the head is the embedding
        yield "lm_head.weight", ("lm_head.weight",), (v, d)
    for layer in range(config.num_layers):
        for ours, theirs, shape in layer_weights:
            names = tuple(f"model.layers.{layer}.{name}.weight" for name in theirs)
            yield f"layers.{layer}.{ours}.weight", names, shape


# --- Export ---------------------------------------------------------------------------------------


def export_llama(model: TransformerLM, tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write a folder that transformers' LlamaForCausalLM and AutoTokenizer load.

    Raises:
        ValueError: the folder holds something; the tokenizer is not the model's, or cannot be written.
        OSError: full disk, unwritable place; then nothing is left there.
    """
    config = model.config
    end = tokenizer.token_id(END_OF_TEXT)
    sizes = f"the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {config.vocab_size}"
    require(tokenizer.vocab_size <= config.vocab_size, f"{sizes}; give the model's own")
    ends = {"bos_token_id": end, "eos_token_id": end}
    with _new_folder(folder) as temporary:
        write_json(temporary / CONFIG_FILE, llama_config(config) | ends)
        write_json(temporary / "generation_config.json", {"do_sample": True, **ends})
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "model_max_length": config.context_length}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
        write_json(temporary / "tokenizer_config.json", settings)
        tokenizer.export_huggingface(temporary / TOKENIZER_FILE)
        try:
            save_file(llama_weights(model), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the system's error, of a full disk for one
            raise OSError(f"cannot write {WEIGHTS_FILE} for {folder}: {error}") from error
    return Path(folder)


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """A model's shape as transformers' LlamaConfig names it. rope_parameters is of transformers 5, rope_theta of 4."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": _EPS,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }


def llama_weights(model: TransformerLM) -> dict[str, Tensor]:
    """A model's weights, fp32 and on the CPU, under transformers' names; a tied head once, as the embedding."""
    weights, exported = checkpoint.model_weights(model), {}
    for ours, theirs, _ in _weights(model.config):
        parts = weights[ours].chunk(len(theirs))
        if len(parts) == 3:
            parts = _halves(parts[0], model.config), _halves(parts[1], model.config), parts[2]
        exported |= {name: part.float().cpu().contiguous() for name, part in zip(theirs, parts, strict=True)}
    return exported


def _halves(weight: Tensor, config: ModelConfig) -> Tensor:
    """Rows of each head from the order of RoPE pairs to the first elements of all pairs, then the second ones."""
    return weight.unflatten(0, (config.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of _halves."""
    return weight.unflatten(0, (config.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# --- Import ---------------------------------------------------------------------------------------


def import_llama(source: str | Path, folder: str | Path) -> Path:
    """Make a run folder, with tokenizer.json and checkpoints/step-00000000, of a folder in Hugging Face's Llama format.

    The checkpoint is for generation and export: it holds no optimizer state to train on with. ValueError: something is
    missing, damaged, contradictory, or more than our model can hold: names it.
    """
    source = Path(source).expanduser()
    require(source.is_dir(), f"no folder at {source}; give the folder of a model in Hugging Face's format")
    values = read_json(source / CONFIG_FILE)
    config = model_config(values, str(source / CONFIG_FILE))
    tokenizer = Tokenizer.from_huggingface(source / TOKENIZER_FILE)
    _check_tokenizer(tokenizer, config, values.get("eos_token_id"), source)
    weights = import_weights(source, config)
    vocabulary = TokenizerConfig(vocab_size=tokenizer.vocab_size)
    settings = PipelineConfig(run_dir=str(folder), model=config, tokenizer=vocabulary)
    with _new_folder(folder) as temporary:
        tokenizer.save(temporary / TOKENIZER_FILE)
        untrained = {"state": {}, "param_groups": []}
        content = checkpoint.snapshot(0, weights=weights, optimizer=untrained, config=settings)
        checkpoint.write(temporary / checkpoint.CHECKPOINTS, content)
    return Path(folder)


def model_config(values: Mapping[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
    """The ModelConfig of a Llama's config.json. ValueError, naming the setting, for what our model cannot hold."""

    def take(name: str, kind: type, default: Any = None) -> Any:
        value = default if values.get(name) is None else values[name]
        require(value is not None, f"{source}: it has no '{name}'")
        if kind is float and type(value) is int:
            value = float(value)
        require(type(value) is kind, f"{source}: '{name}' must be {kind.__name__}, got {json.dumps(value)}")
        return value

    def only(name: str, allowed: Any, what: str) -> None:
        value = values.get(name)
        is_allowed = value is None or value == allowed
        require(is_allowed, f"{source}: '{name}' is {json.dumps(value)}, which is not supported: {what}")

    kind = values.get("model_type")
    require(kind == "llama", f"{source}: 'model_type' is {json.dumps(kind)}; only 'llama' can be imported")
    only("hidden_act", "silu", "the feed-forward of our model is SwiGLU, 'silu'")
    only("attention_bias", False, "our projections have no biases")
    only("mlp_bias", False, "our projections have no biases")
    only("quantization_config", None, "give weights in fp32, bf16 or fp16")
    heads, width = take("num_attention_heads", int), take("hidden_size", int)
    only("num_key_value_heads", heads, f"our model has a key head for each of its {heads} query heads")
    eps = take("rms_norm_eps", float, 1e-6)  # transformers' default
    require(eps == _EPS, f"{source}: 'rms_norm_eps' is {eps:g}, which is not supported: our RMSNorm has {_EPS:g}")
    shape = {
        "d_model": width,
        "d_ff": take("intermediate_size", int),
        "num_layers": take("num_hidden_layers", int),
        "num_heads": heads,
        "context_length": take("max_position_embeddings", int),
        "vocab_size": take("vocab_size", int),
        "rope_theta": _rope_theta(values, source),
        "tie_embeddings": take("tie_word_embeddings", bool, False),
    }
    try:
        built = ModelConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    only("head_dim", built.head_dim, f"our heads have hidden_size / num_attention_heads = {built.head_dim} elements")
    longest = f"{source}: 'max_position_embeddings' is {built.context_length}, which is not supported"
    require(built.context_length <= _LONGEST, f"{longest}: at most {_LONGEST}; set it lower")
    return built


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """RoPE's base, from rope_theta or from rope_parameters, of which rope_scaling is the older name."""
    theta = values.get("rope_theta")
    for section in ("rope_parameters", "rope_scaling"):
        rope = values.get(section)
        if rope is None:
            continue
        require(isinstance(rope, dict), f"{source}: '{section}' must be an object, got {json.dumps(rope)}")
        kind, partial = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor", 1)
        what = f"{source}: RoPE of type {json.dumps(kind)} in '{section}' is not supported"
        require(kind == "default", f"{what}: our model has plain RoPE, 'default'")
        what = f"{source}: 'partial_rotary_factor' is {json.dumps(partial)}"
        require(partial == 1, f"{what}: our RoPE rotates whole heads")
        theta = rope.get("rope_theta", theta)
    theta = 10_000.0 if theta is None else theta
    is_positive = type(theta) in (int, float) and 0 < theta < float("inf")
    require(is_positive, f"{source}: 'rope_theta' must be a positive number, got {json.dumps(theta)}")
    return float(theta)


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, ends: Any, source: Path) -> None:
    """ValueError unless the tokenizer is the model's, and ends texts as ours do. ends: eos_token_id, one or a list."""
    file, size = source / TOKENIZER_FILE, config.vocab_size
    highest = f"{file}: its ids go up to {tokenizer.vocab_size - 1}"
    require(tokenizer.vocab_size <= size, f"{highest}, and the model's vocabulary has {size}")
    special = f"{file}: it has no special token {END_OF_TEXT}, with which our texts end"
    require(END_OF_TEXT in tokenizer.special_tokens, special)
    end = tokenizer.token_id(END_OF_TEXT)
    what = f"{source / CONFIG_FILE}: 'eos_token_id' is {json.dumps(ends)}"
    fits = ends is None or end in (ends if isinstance(ends, list) else [ends])
    require(fits, f"{what}, and {END_OF_TEXT}, with which our texts end, is {end}")


def import_weights(source: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights in fp32 under our names, of model.safetensors or the files that its index.json lists."""
    with ExitStack() as opened:
        take, imported = _open_weights(Path(source), config, opened), {}
        for ours, theirs, _ in _weights(config):
            parts = [take(name) for name in theirs]
            if len(parts) == 3:
                parts[:2] = _pairs(parts[0], config), _pairs(parts[1], config)
            imported[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return imported


def _open_weights(folder: Path, config: ModelConfig, opened: ExitStack) -> Callable[[str], Tensor]:
    """A function name -> fp32 tensor, once names, shapes and dtypes of all tensors are those of the config."""
    files = {}  # tensor -> (its file, the open file)
    for path in _weight_files(folder):
        try:
            file = opened.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
        for name in file.keys():  # noqa: SIM118 -- not a dict
            require(name not in files, f"{path}: {name} is also in {files.get(name, [''])[0]}")
            files[name] = path, file
    wanted = {}
    for _, names, shape in _weights(config):
        for name in names:
            missing = f"{folder}: no file has the tensor {name}, of a model with the shape in {CONFIG_FILE}"
            require(name in files, missing)
            wanted[name] = shape
    for name, (path, file) in files.items():
        if name not in wanted:
            # Older files hold RoPE's frequencies, and a tied head twice; neither is a weight of its own.
            known = name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)
            require(known, f"{path}: the tensor {name} has no place in our model")
            continue
        found = file.get_slice(name)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        require(shape == wanted[name], f"{path}: {name} is {shape}, and {wanted[name]} by {CONFIG_FILE}")
        require(dtype in _FLOATS, f"{path}: {name} is {dtype}, which is not supported: {', '.join(_FLOATS)} are")
    return lambda name: files[name][1].get_tensor(name).float()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        file = folder / WEIGHTS_FILE
        pickled = "; its pytorch_model.bin is a pickle, which is not read" if any(folder.glob("*.bin")) else ""
        require(file.is_file(), f"no {WEIGHTS_FILE} in {folder}{pickled}: save the model as safetensors")
        return [file]
    names = read_json(index).get("weight_map")
    are_names = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    require(are_names, f"{index}: it has no 'weight_map' from tensors to files")
    files = sorted(set(names.values()))
    for name in files:
        require(name == Path(name).name and name not in ("", ".."), f"{index}: '{name}' is not a file of this folder")
    return [folder / name for name in files]


# --- Files ----------------------------------------------------------------------------------------


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, flushed to the disk, when the block ends well, and else goes."""
    path = Path(path).expanduser().resolve()
    is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(is_free, f"{path} exists and is not an empty folder; give a new one, or remove it")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp"))
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):  # mkdtemp and safetensors make theirs for the owner alone
                file.chmod(0o755 if file.is_dir() else 0o644)
                flush(file)
            os.rename(temporary, path)
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
