"""The commands of `python -m lmsys` that are not notebooks: their signatures are their flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token

from lmsys import records
from lmsys import report as reports
from lmsys.config import MODEL_SIZES, GenerateConfig, require

Scale = Literal["auto", "smoke", "cpu", "full"]


def flag(text: str, **options: object) -> Parameter:
    return Parameter(help=text, **options)


def count(text: str) -> Parameter:
    """Of a whole number; cyclopts would round others."""

    def read(_type: type, tokens: Sequence[Token]) -> int:
        try:
            return int(tokens[0].value)
        except ValueError:
            raise ValueError(f"'{tokens[0].value}' is not a whole number") from None

    return flag(text, converter=read)


Machine = Annotated[str | None, flag("results go to artifacts/MACHINE (default: LMSYS_MACHINE, else local)")]


@Parameter(name="*")
@dataclass(frozen=True)
class Settings:
    """Flags over the settings of lmsys/config.py."""

    config: Annotated[Path | None, flag("JSON file of settings, which flags and --override win over")] = None
    override: Annotated[list[str], flag("section.key=value ...: any setting; JSON, or a plain string")] = ()
    attention_kernel: Annotated[str | None, flag("attention kernel by name")] = None
    ddp_wrapper: Annotated[str | None, flag("data-parallel wrapper by name")] = None
    sharded_optimizer: Annotated[bool | None, flag("ZeRO-1: each process keeps its share of the state")] = None
    run_dir: Annotated[str | None, flag("folder of the run; a relative one lies in the repository")] = None

    def flags(self) -> dict[str, object]:
        train = {
            f"train.{name}": getattr(self, name) for name in ("attention_kernel", "ddp_wrapper", "sharded_optimizer")
        }
        return train | {"run_dir": self.run_dir}


def pipeline(
    *,
    settings: Settings = Settings(),
    scale: Annotated[Scale | None, flag("preset; auto is full on a CUDA GPU, else cpu (default: auto)")] = None,
    text: Annotated[str | None, flag("your own UTF-8 text file: data.text_path, with dataset_mode=local_text")] = None,
    processes: Annotated[int | None, count("to train in (default: with a --ddp_wrapper, one a GPU)")] = None,
    skip_data: Annotated[bool, flag("take the run folder's tokenizer and token files as they are")] = False,
    machine: Machine = None,
) -> None:
    """Text to a trained model: data, tokenizer, token files, training, evaluation, stories.

    Stages whose outputs exist and match their settings are skipped; training resumes from its newest checkpoint.
    Settings: preset of the scale < --config file < --override < named flags.
    Such as: pipeline --text my.txt --override train.steps=500
    """
    from lmsys import pipeline as pipelines

    config = pipelines.settings(
        scale=scale,
        config=settings.config,
        overrides=settings.override,
        text_path=text,
        attention_kernel=settings.attention_kernel,
        ddp_wrapper=settings.ddp_wrapper,
        run_dir=settings.run_dir,
        sharded_optimizer=settings.sharded_optimizer,
        processes=processes,
    )
    folder = records.artifacts_dir(machine)
    result = pipelines.run(config, skip_data=skip_data)
    for story in result.stories:
        print(f"{story['text']}\n")
    metrics, _ = pipelines.write_report(result, folder)
    _print_written([metrics, metrics.with_name("pipeline_loss.png")])


def train(
    *,
    size: Annotated[str | None, flag(f"{', '.join(MODEL_SIZES)} (default: the --config's model, else small)")] = None,
    context_length: Annotated[int | None, count("tokens of a sequence (default: the --config's, else 512)")] = None,
    vocab_size: Annotated[int | None, count("vocabulary (default: the size's own, or the tokenizer's)")] = None,
    text: Annotated[str | None, flag("a UTF-8 file to train on (default: token files, else random tokens)")] = None,
    train_tokens: Annotated[str | None, flag(".npy token file to train on")] = None,
    valid_tokens: Annotated[str | None, flag(".npy token file to validate with")] = None,
    tokenizer: Annotated[str | None, flag("tokenizer.json (default, for --text: one is trained on it)")] = None,
    num_tokens: Annotated[int, count("random tokens to train on (default: 1000000)")] = 1_000_000,
    steps: Annotated[int | None, count("optimizer steps (default: from --epochs)")] = None,
    epochs: Annotated[float | None, flag("passes over the tokens (default: 1, unless --steps)")] = None,
    batch_size: Annotated[int | None, count("sequences a batch")] = None,
    learning_rate: Annotated[float | None, flag("highest learning rate")] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, flag("bf16, fp16: autocast; parameters: fp32")] = None,
    compile: Annotated[bool | None, flag("torch.compile, block by block")] = None,
    device: Annotated[str | None, flag("auto, cpu, cuda or cuda:N")] = None,
    resume: Annotated[bool, flag("continue the run folder's newest checkpoint")] = False,
    settings: Settings = Settings(),
) -> None:
    """Train a model on token files, random tokens or a text file, without the pipeline's stages.

    For several processes: torchrun --nproc_per_node=N -m lmsys train ... --ddp_wrapper flashddp.
    Such as: train --size small --epochs 2 --batch_size 4 --context_length 512 --dtype bf16
    """
    from lmsys.pipeline import train_alone

    flags = {"train.steps": steps, "train.epochs": epochs, "train.batch_size": batch_size, "train.dtype": dtype}
    flags |= {"train.compile": compile, "train.device": device, "optim.learning_rate": learning_rate}
    flags |= {"data.train_tokens_path": train_tokens, "data.valid_tokens_path": valid_tokens}
    history = train_alone(
        size,
        context_length=context_length,
        vocab_size=vocab_size,
        text=text,
        tokenizer_path=tokenizer,
        num_tokens=num_tokens,
        resume=resume,
        file=settings.config,
        overrides=settings.override,
        flags=flags | settings.flags(),
    )
    if os.environ.get("RANK", "0") == "0":
        loss = "none, as every step was skipped" if history.train_loss is None else f"{history.train_loss:.4f}"
        print(f"step {history.rows[-1]['step']}: training loss {loss}, validation loss {history.valid_loss:.4f}")
        print(f"checkpoint: {history.checkpoint}")


def generate(
    *,
    checkpoint: Annotated[str, flag("a checkpoint, or a run folder (then its newest good one)")],
    prompt: Annotated[list[str], flag("text to continue; may be repeated", consume_multiple=False)],
    tokenizer: Annotated[str | None, flag("tokenizer.json (default: the run folder's)")] = None,
    max_new_tokens: Annotated[int, count("tokens to write at most (default: 200)")] = 200,
    temperature: Annotated[float, flag("0 is greedy (default: 0.8)")] = 0.8,
    top_k: Annotated[int, count("sample among the k likeliest; 0 is off (default: 0)")] = 0,
    top_p: Annotated[float, flag("nucleus sampling; 1 is off (default: 0.95)")] = 0.95,
    seed: Annotated[int, count("of the sampling (default: 0)")] = 0,
    no_cache: Annotated[bool, flag("read the whole window anew for each token, to compare")] = False,
    device: Annotated[str, flag("auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Write text with a trained model, as it comes; its speed on standard error. Prompts are continued together.

    Such as: generate --checkpoint runs/pipeline-cpu --prompt "Once upon a time"
    """
    settings = GenerateConfig(tuple(prompt), max_new_tokens, temperature, top_k, top_p, seed)
    from lmsys.generate import generate_texts
    from lmsys.pipeline import load_run

    model, tokenizer = load_run(checkpoint, tokenizer, device=device)
    _, written = generate_texts(
        model,
        tokenizer,
        settings.prompts,
        settings,
        use_cache=not no_cache,
        cuda_graph=model.token_embeddings.weight.is_cuda,
        write=lambda piece: print(piece, end="", flush=True),
    )
    print(written.speed(), file=sys.stderr)


def export(
    *,
    checkpoint: Annotated[str, flag("a checkpoint, or a run folder (then its newest good one)")],
    output: Annotated[str, flag("the folder to write; it must not exist, or be empty")],
    tokenizer: Annotated[str | None, flag("tokenizer.json (default: the run folder's)")] = None,
) -> None:
    """Write a model in Hugging Face's Llama format: weights in fp32, the same logits.

    Such as: export --checkpoint runs/pipeline-cpu --output exported
    """
    from lmsys import interchange
    from lmsys.pipeline import load_run

    model, tokenizer = load_run(checkpoint, tokenizer, device="cpu")
    _print_written([interchange.export_llama(model, tokenizer, output)])


def import_hf(
    *,
    input: Annotated[str, flag("the model's folder: config.json, safetensors, byte-level tokenizer.json")],
    output: Annotated[str, flag("the run folder to write; it must not exist, or be empty")],
) -> None:
    """Make a run folder of a model in Hugging Face's Llama format. What our model cannot hold is refused by name.

    Such as: import-hf --input exported --output runs/imported
    """
    from lmsys import interchange

    _print_written([interchange.import_llama(input, output)])


def compare(
    a: Annotated[str, flag("a result file (.csv), the reference")],
    b: Annotated[str, flag("another of the same kind")],
    *,
    threshold: Annotated[float, flag("slowdown that counts, as a share (default: 0.05)")] = 0.05,
) -> int:
    """Compare two result files row by row: medians, percentiles, ratio, verdict.

    Exit code 1 where a row of B is slower by more than the threshold and beyond both spreads, or ran in A and does not
    in B.
    """
    rows = records.compare(a, b, threshold=threshold)
    print(records.comparison_table(rows), end="")
    counts = ", ".join(f"{(rows.verdict == name).sum()} {name}" for name in records.VERDICTS)
    print(f"{len(rows)} rows: {counts}")
    return int(rows.verdict.isin(records.VERDICTS[:2]).any())


def report(
    *notebooks: Annotated[str, flag("by name (default: those in notebooks/report.txt)")],
    scale: Annotated[Scale, flag("preset; auto is full on a CUDA GPU, else cpu")] = "auto",
    machine: Machine = None,
    no_site: Annotated[bool, flag("execute the notebooks only")] = False,
    site_only: Annotated[bool, flag("build the site only")] = False,
) -> int:
    """Execute notebooks to book/MACHINE/, results to artifacts/MACHINE/, and build the site, book/_build/html/.

    A notebook that fails does not stop the others; the exit code is 1 then.
    """
    require(not (no_site and site_only), "--no_site and --site_only leave nothing to do; give one of them")
    names = [] if site_only else [name.replace("-", "_") for name in notebooks] or reports.listed()
    failed = reports.run_notebooks(names, scale=scale, machine=machine)
    if not no_site:
        print(f"site: {reports.build_site()}")
    if failed:
        print(f"lmsys report: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _print_written(paths: Sequence[Path]) -> None:
    print("written: " + " ".join(os.path.relpath(path) for path in paths))
