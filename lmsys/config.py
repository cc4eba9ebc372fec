"""Configuration: frozen dataclasses, presets as functions, and the way from JSON and overrides to a config.

A pipeline's settings come from four layers, each winning over the one before:
the preset of the scale < the JSON file < `--override section.key=value` < named flags.
Unknown keys, wrong types and impossible combinations raise ValueError before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from lmsys.options import DTYPES, STEP_PRESETS, check_rules, with_preset

SCALES = ("auto", "smoke", "cpu", "full")
DATASET_MODES = ("auto", "tinystories", "local_text", "local_npy", "stories")
TRAIN_DTYPES = (*DTYPES, "fp16")  # fp16: with a gradient scaler, for GPUs without bf16
TRANSPORTS = ("auto", "nccl", "copy_engine")  # of gradients, see lmsys.parallel.ddp
END_OF_TEXT = "<|endoftext|>"


def unknown_name(what: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table: what was given, the nearest known name, all known names."""
    known, given = list(known), shortened(str(given))
    near = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ValueError(f"unknown {what} '{given}'.{hint} Known: {', '.join(known)}.")


def shortened(text: str, most: int = 100) -> str:
    """What a message shows of a text that was given."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


# --- The sections ---------------------------------------------------------------------------------


class Bound(NamedTuple):
    """What the values of a setting satisfy; null is free where the type allows it."""

    holds: Callable[[Any], bool]
    text: str  # "it must be ..."


AT_LEAST_1 = Bound(lambda value: value >= 1, "at least 1")
AT_LEAST_0 = Bound(lambda value: value >= 0, "0 or more")
POSITIVE = Bound(lambda value: value > 0, "positive")
DECAY = Bound(lambda value: 0 <= value < 1, "in [0, 1)")


_hints = functools.cache(typing.get_type_hints)  # which evaluates each annotation anew


class Section:
    """A section of the settings; an annotation with a Bound, or the names that are known, is checked."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Config").lower()
        for name, hint in _hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if value is None or not hasattr(hint, "__metadata__"):
                continue
            (rule,) = hint.__metadata__
            if isinstance(rule, Bound):
                require(rule.holds(value), f"{section}.{name} is {value}; it must be {rule.text}")
            elif value not in rule:
                raise unknown_name(f"{section}.{name}", value, rule)


@dataclass(frozen=True)
class DataConfig(Section):
    """Which text becomes which token files."""

    dataset_mode: Annotated[str, DATASET_MODES] = "auto"
    text_path: str | None = None  # local_text (and auto): a UTF-8 file
    valid_text_path: str | None = None  # its validation text; without it the end of text_path is held out
    train_tokens_path: str | None = None  # local_npy (and auto): token files that exist
    valid_tokens_path: str | None = None
    valid_fraction: Annotated[float, Bound(lambda value: 0 < value < 1, "between 0 and 1")] = 0.05  # where no file is
    # Megabytes (1e6 bytes) to generate (stories) or to stream (tinystories); null: all of TinyStories.
    text_mb: Annotated[float | None, Bound(lambda value: value > 0, "positive, or null")] = 5.0
    seed: int = 0  # of the story generator

    def __post_init__(self):
        super().__post_init__()
        require(
            self.text_mb is not None or self.dataset_mode != "stories",
            "data.text_mb is null, but dataset_mode 'stories' generates as much text as it says: give a number of MB",
        )
        if self.dataset_mode == "local_text":
            require(self.text_path is not None, "dataset_mode 'local_text' needs data.text_path, a UTF-8 text file")
        if self.dataset_mode == "local_npy":
            require(
                self.train_tokens_path is not None and self.valid_tokens_path is not None,
                "dataset_mode 'local_npy' needs data.train_tokens_path and data.valid_tokens_path, .npy token files",
            )


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """The byte-level BPE vocabulary: 256 bytes, the special tokens, and merges up to vocab_size."""

    vocab_size: int = 10_000
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    path: str | None = None  # of a trained tokenizer to use in place of training one; local_npy decodes samples with it
    num_workers: Annotated[int | None, AT_LEAST_1] = None  # processes that train and tokenize; null: one for each core

    def __post_init__(self):
        super().__post_init__()
        least = 256 + len(self.special_tokens)
        require(
            self.vocab_size >= least,
            f"tokenizer.vocab_size is {self.vocab_size}; it must be at least {least}: "
            f"256 bytes and {len(self.special_tokens)} special token(s)",
        )
        require(END_OF_TEXT in self.special_tokens, f"tokenizer.special_tokens must contain '{END_OF_TEXT}'")
        require(len(set(self.special_tokens)) == len(self.special_tokens), "tokenizer.special_tokens has a token twice")
        require(all(self.special_tokens), "tokenizer.special_tokens has an empty token")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of a TransformerLM. vocab_size None stands for the tokenizer's size and is resolved before use."""

    d_model: Annotated[int, AT_LEAST_1] = 512
    d_ff: Annotated[int, AT_LEAST_1] = 1344
    num_layers: Annotated[int, AT_LEAST_1] = 4
    num_heads: Annotated[int, AT_LEAST_1] = 16
    context_length: Annotated[int, AT_LEAST_1] = 256
    vocab_size: Annotated[int | None, AT_LEAST_1] = None
    rope_theta: Annotated[float, POSITIVE] = 10_000.0
    tie_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(
            self.d_model % self.num_heads == 0,
            f"model.d_model {self.d_model} is not a multiple of model.num_heads {self.num_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.d_model {self.d_model} over model.num_heads {self.num_heads} is {self.head_dim}; "
            "RoPE needs an even head_dim",
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up to learning_rate, cosine down to min_learning_rate at the last step."""

    learning_rate: Annotated[float, POSITIVE] = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: Annotated[int, AT_LEAST_0] = 100
    beta1: Annotated[float, DECAY] = 0.9
    beta2: Annotated[float, DECAY] = 0.95
    eps: Annotated[float, POSITIVE] = 1e-8
    weight_decay: Annotated[float, AT_LEAST_0] = 0.1
    max_grad_norm: float = 1.0  # clip the global gradient norm here; 0 or less: no clipping

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate} must lie between 0 and "
            f"optim.learning_rate {self.learning_rate}",
        )


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop. Exactly one of steps and epochs is set."""

    steps: Annotated[int | None, AT_LEAST_1] = 2000
    epochs: Annotated[float | None, POSITIVE] = None  # over the training tokens; becomes steps once these are counted
    batch_size: Annotated[int, AT_LEAST_1] = 32  # sequences a process and micro-batch
    gradient_accumulation_steps: Annotated[int, AT_LEAST_1] = 1
    # bf16, fp16: autocast, parameters stay fp32; fp16 scales the loss, and skips a step that overflows.
    dtype: Annotated[str, TRAIN_DTYPES] = "fp32"
    step_preset: Annotated[str, STEP_PRESETS] = "plain"  # which sets the switches that are null here
    compile: bool | None = None  # torch.compile, block by block
    autotune: bool = False  # with compile: inductor times its own matmuls beside cuBLAS's, for minutes
    fused_loss: bool | None = None  # head and loss in one, by chunks: no logits of all tokens (lmsys.step.loss)
    fused_rope: bool | None = None  # rotation and splitting of Q, K and V as one kernel (lmsys.step.rope)
    merged_gate: bool | None = None  # the feed-forward layer's first two matrices as one (lmsys.step.gate)
    written_backward: bool | None = None  # not compiled: blocks with a backward pass of our own (lmsys.step.blocks)
    fused_optimizer: bool | None = None  # AdamW in one pass over memory (lmsys.step.adamw)
    # Of the residual from block to block; null, set by no preset: the embedding's.
    residual_dtype: Annotated[str | None, DTYPES] = None
    cuda_graph: bool = False  # forward and backward as one CUDA graph, for a GPU that waits for its host
    device: str = "auto"
    attention_kernel: str = "vectorized_torch"
    ddp_wrapper: str = "none"
    # That the pipeline trains in; null: one a GPU where ddp_wrapper needs several, else one.
    processes: Annotated[int | None, AT_LEAST_1] = None
    sharded_optimizer: bool = False  # ZeRO-1: each process keeps its share of the optimizer's state
    reduce_scatter_gradients: bool = False  # with it: each process receives the gradients of its share alone
    # Gradients that travel together; null: the wrapper's own.
    bucket_size_mb: Annotated[float | None, Bound(lambda mb: mb >= 0, "positive, or 0 for one bucket a parameter")] = (
        None
    )
    communication_dtype: Annotated[str | None, DTYPES] = None  # of gradients between processes; null: the wrapper's own
    # Of gradients: nccl, copy_engine, or auto; null: auto with cuda_graph, else nccl.
    transport: Annotated[str | None, TRANSPORTS] = None
    eval_interval: int = 200  # steps between evaluations; 0 or less: only at the end
    eval_batches: Annotated[int, AT_LEAST_1] = 20  # of a step's size: over all processes and micro-batches
    sample_interval: int = 500  # steps between samples; 0 or less: only at the end
    log_interval: Annotated[int, AT_LEAST_1] = 10  # steps between rows of metrics.csv
    checkpointing_interval: int = 500  # N > 0: save every N steps; <= 0: only the last step, which is always saved
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2  # the newest that stay on disk
    # And so many of lowest validation loss, which is then computed at every checkpoint.
    keep_best_checkpoints: Annotated[int, AT_LEAST_0] = 0
    async_checkpoints: bool = True  # write them while training goes on, from a copy in host memory
    # A loss or gradient that is not finite, or a spike: stop, or skip that step's update.
    on_bad_step: Annotated[str, ("stop", "skip")] = "stop"
    # A spike is a loss this many times the median of the steps before; null: none is.
    loss_spike: Annotated[float | None, Bound(lambda times: times > 1, "above 1, as 3 for thrice, or null")] = None
    resume: bool = True  # continue from the newest good checkpoint of the run folder
    seed: int = 0

    def __post_init__(self):
        require(
            (self.steps is None) != (self.epochs is None),
            f"set exactly one of train.steps ({self.steps}) and train.epochs ({self.epochs}); give null for the other",
        )
        super().__post_init__()
        from lmsys import parallel  # where importing the table imports this module

        wrapper, named = parallel.get_wrapper(self.ddp_wrapper), f"train.ddp_wrapper '{self.ddp_wrapper}'"
        for name in sorted({option for known in parallel.WRAPPERS.values() for option in known.options}):
            require(
                getattr(self, name) is None or name in wrapper.options,
                f"train.{name} is an option of {', '.join(parallel.takers(name))}, and {named} does not take it; "
                "leave it out",
            )
        about = ("sharded", "replicated", "capturable", "plain_tensors")
        facts = vars(self) | {f"wrapper.{name}": getattr(wrapper, name) for name in about}
        facts |= with_preset(facts)
        check_rules(facts)
        for name in STEP_PRESETS[self.step_preset]:
            object.__setattr__(self, name, facts[name])


@dataclass(frozen=True)
class GenerateConfig(Section):
    """How samples are drawn. top_k 0 and top_p 1 switch those filters off; temperature 0 is greedy."""

    prompts: tuple[str, ...] = ("Once upon a time", "One day")
    max_new_tokens: Annotated[int, AT_LEAST_1] = 200
    temperature: Annotated[float, Bound(lambda value: value >= 0, "0 (greedy) or more")] = 0.8
    top_k: Annotated[int, Bound(lambda value: value >= 0, "0 (off) or more")] = 0
    top_p: Annotated[float, Bound(lambda value: 0 < value <= 1, "in (0, 1]")] = 0.95
    seed: int = 0


@dataclass(frozen=True)
class WandbConfig(Section):
    """Weights & Biases. mode auto: online when logged in, else offline; WANDB_MODE wins over it."""

    project: str = "lmsys"
    name: str | None = None
    mode: Annotated[str, ("auto", "offline", "online", "disabled")] = "auto"


@dataclass(frozen=True)
class PipelineConfig:
    """Everything a pipeline run needs. run_dir: a relative one lies in the repository, and stays in it."""

    scale: str = "full"
    run_dir: str = "runs/pipeline"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self):
        parts = Path(self.run_dir).parts
        require(
            bool(parts) and ".." not in parts and "\0" not in self.run_dir,
            f"run_dir is {self.run_dir!r}; give the name of a folder, such as runs/mine, or an absolute path, "
            "without '..'",
        )
        require(
            self.train.steps is None or self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps {self.optim.warmup_steps} is more than train.steps {self.train.steps}",
        )


# --- Presets --------------------------------------------------------------------------------------

# The course's 2025 table (CS336 assignment 2, section 1.1.2): d_model, d_ff, layers, heads. Its 2026 table calls 2.7b
# xl, and adds 10b. gpt2 and gpt2-medium are nanoGPT's 124M and 350M shapes; tiny and mini are for the CPU.
MODEL_SIZES = {
    "tiny": (64, 192, 2, 2),
    "mini": (128, 384, 4, 4),
    "small": (768, 3072, 12, 12),
    "medium": (1024, 4096, 24, 16),
    "large": (1280, 5120, 36, 20),
    "xl": (1600, 6400, 48, 25),
    "2.7b": (2560, 10240, 32, 32),
    "10b": (4608, 12288, 50, 36),
    "gpt2": (768, 3072, 12, 12),
    "gpt2-medium": (1024, 4096, 24, 16),
}


def model_size(size: str, *, vocab_size: int | None = None, context_length: int = 256, **other: Any) -> ModelConfig:
    """The model of a named size. vocab_size None: 50304 for the nanoGPT shapes, 10000 for the course's."""
    if size not in MODEL_SIZES:
        raise unknown_name("model size", size, MODEL_SIZES)
    d_model, d_ff, num_layers, num_heads = MODEL_SIZES[size]
    if vocab_size is None:
        vocab_size = 50_304 if size.startswith("gpt2") else 10_000
    return ModelConfig(d_model, d_ff, num_layers, num_heads, context_length, vocab_size, **other)


def resolve_scale(scale: str = "auto") -> str:
    """smoke, cpu or full. auto takes LMSYS_SCALE if it is set, else full on a CUDA GPU and cpu without one."""
    if scale == "auto":
        scale = os.environ.get("LMSYS_SCALE") or "auto"
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    if scale == "auto":
        import torch

        scale = "full" if torch.cuda.is_available() else "cpu"
    return scale


def pipeline_preset(scale: str) -> dict[str, Any]:
    """The settings that a scale gives a pipeline, as a nested dict: the lowest layer of the four.

    cpu: on two cores 70 to 90 s to a validation loss of 0.85; 1,400 steps reach 0.79, 1,120 0.90. At 1,500 steps:
    learning rate 1e-2 0.77, 1.5e-2 0.84; 3 layers of 96 0.80. 1,300 steps of width 160: 0.79. Embeddings tied: 1.06.
    At 300 steps, 3 layers of 96 and a context of 128 it is 2.1, and few sentences are whole.
    """
    presets = read_json(Path(__file__).parent / "configs" / "pipeline_presets.json")
    return {"scale": scale, **presets[scale]}


# --- JSON and overrides -> config -----------------------------------------------------------------


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file and the place where it does not parse."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no config file at {path.resolve()}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, an integer too long, nested too deep
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    require(isinstance(value, dict), f"{path}: expected a JSON object with sections, got {type(value).__name__}")
    return value


def parse_override(text: str) -> dict[str, Any]:
    """'train.steps=100' -> {'train': {'steps': 100}}. The value is JSON, and a string where it is not JSON."""
    key, equals, raw = text.partition("=")
    require(bool(equals) and bool(key.strip()), f"override '{text}' is not of the form section.key=value")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def pipeline_config(
    scale: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> PipelineConfig:
    """The config of a pipeline run: preset of the scale < file < overrides < flags.

    Args:
        scale: auto, smoke, cpu or full; None takes it from the layers above ('scale' key), else auto.
        file: a JSON file with (some of) PipelineConfig's sections.
        overrides: 'section.key=value' each, later ones winning.
        flags: named flags as {'section.key': value}; None values are ignored.
    Raises:
        ValueError: unknown key, wrong type, or settings that cannot go together.
    """
    layers = [] if file is None else [(str(file), read_json(file))]
    layers += [(f"override '{text}'", parse_override(text)) for text in overrides]
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    layers += [(f"flag {key}", parse_override(f"{key}={json.dumps(value)}")) for key, value in given.items()]
    if scale is None:
        scale = next((layer["scale"] for _, layer in reversed(layers) if "scale" in layer), "auto")
    scale = resolve_scale(scale)
    merged = pipeline_preset(scale)
    for source, layer in _with_one_interval(layers):
        _merge(merged, layer | {"scale": scale}, PipelineConfig, source)
    if merged["train"].get("epochs") is not None and not any("steps" in layer.get("train", ()) for _, layer in layers):
        merged["train"]["steps"] = None  # epochs were asked for: the preset's steps give way
    return build(PipelineConfig, merged)


def _with_one_interval(layers: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Layers without the other names of train.checkpointing_interval: checkpointing_every is the same setting,
    save_interval an older one that gives way to it in any layer."""
    older = []
    for source, layer in layers:
        train = layer.get("train")
        if not isinstance(train, dict):
            continue
        if "save_interval" in train:
            older.append((source, {"train": {"checkpointing_interval": train.pop("save_interval")}}))
        if "checkpointing_every" in train:
            same = train.pop("checkpointing_every")
            interval = train.setdefault("checkpointing_interval", same)
            require(
                interval == same,
                f"{source}: train.checkpointing_interval {interval} and train.checkpointing_every {same} are one "
                "setting with two values",
            )
    return older + layers


def _merge(into: dict[str, Any], layer: Mapping[str, Any], cls: type, source: str, prefix: str = "") -> None:
    hints = _hints(cls)
    for key, value in layer.items():
        if key not in hints:
            raise ValueError(f"{source}: {unknown_name('key', prefix + key, [prefix + name for name in hints])}")
        if dataclasses.is_dataclass(hints[key]):
            require(
                isinstance(value, dict),
                f"{source}: '{prefix}{key}' is a section; give it as an object, not {shortened(repr(value))}",
            )
            _merge(into.setdefault(key, {}), value, hints[key], source, f"{prefix}{key}.")
        else:
            into[key] = _check_type(prefix + key, value, hints[key], source)


def _check_type(key: str, value: Any, hint: Any, source: str) -> Any:
    """value as the type that a dataclass field states, or ValueError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            if all(isinstance(item, str) for item in value):
                return tuple(value)
        elif option is not float and type(value) is option:
            return value
    names = {option: getattr(option, "__name__", "") for option in options} | {type(None): "null"}
    wanted = " or ".join(
        "a list of strings" if typing.get_origin(option) is tuple else names[option] for option in options
    )
    raise ValueError(f"{source}: '{key}' must be {wanted}, got {shortened(json.dumps(value, default=str))}")


def build(cls: type, values: Mapping[str, Any], source: str = "config") -> Any:
    """A config dataclass from a nested dict, every key and type checked."""
    checked: dict[str, Any] = {}
    _merge(checked, values, cls, source)
    hints = _hints(cls)
    return cls(
        **{k: build(hints[k], v, source) if dataclasses.is_dataclass(hints[k]) else v for k, v in checked.items()}
    )


def with_train(config: PipelineConfig, **settings: Any) -> PipelineConfig:
    """The config with other settings of its train section."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready nested dicts; build(type(config), to_dict(config)) == config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
