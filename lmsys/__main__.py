"""python -m lmsys COMMAND: one thin function a command; the notebooks call the same functions of the package.

Bad input ends in one line on standard error and exit code 2. LMSYS_TRACEBACK=1 shows the traceback as well. A command that SIGTERM
ends leaves nothing half-written and has exit code 143; one that trains saves a checkpoint first, and on SIGINT too (exit code 130).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 for a slowdown that compare found or a loss that faults found, 2 for bad input and a run that it made impossible."""
    arguments = _parser().parse_args(argv)
    try:
        with _ended_by_sigterm(arguments.command):
            return arguments.function(arguments) or 0
    except (ValueError, OSError, FloatingPointError) as error:  # bad input, or a loss that is not finite
        if os.environ.get("LMSYS_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others under torchrun were given the same
            print(f"lmsys {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lmsys {arguments.command}: interrupted; what was written so far stays", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _ended_by_sigterm(command: str) -> Iterator[None]:
    """Within the block, SIGTERM is an exception, so that temporary files go and processes that were started end."""
    owner = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a worker that was forked here
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # once is enough: what it starts must not be cut off
        print(f"lmsys {command}: ended by SIGTERM; what was written so far stays", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


# --- Commands -------------------------------------------------------------------------------------


def pipeline(arguments: argparse.Namespace) -> None:
    from lmsys import pipeline as pipelines
    from lmsys.records import artifacts_dir

    config = pipelines.settings(
        scale=arguments.scale,
        config=arguments.config,
        overrides=arguments.override,
        text_path=arguments.text,
        attention_kernel=arguments.attention_kernel,
        ddp_wrapper=arguments.ddp_wrapper,
        run_dir=arguments.run_dir,
        sharded_optimizer=arguments.sharded_optimizer,
        processes=arguments.processes,
    )
    folder = artifacts_dir(arguments.machine)
    result = pipelines.run(config, skip_data=arguments.skip_data)
    for story in result.stories:
        print(f"{story['text']}\n")
    metrics, figure = pipelines.write_report(result, folder)
    _print_written([metrics, figure.path])


def train(arguments: argparse.Namespace) -> None:
    from lmsys.pipeline import train_alone

    flags = {
        "run_dir": arguments.run_dir,
        "train.steps": arguments.steps,
        "train.epochs": arguments.epochs,
        "train.batch_size": arguments.batch_size,
        "train.dtype": arguments.dtype,
        "train.compile": arguments.compile,
        "train.device": arguments.device,
        "train.attention_kernel": arguments.attention_kernel,
        "train.ddp_wrapper": arguments.ddp_wrapper,
        "train.sharded_optimizer": arguments.sharded_optimizer,
        "data.train_tokens_path": arguments.train_tokens,
        "data.valid_tokens_path": arguments.valid_tokens,
        "optim.learning_rate": arguments.learning_rate,
    }
    history = train_alone(
        arguments.size,
        context_length=arguments.context_length,
        vocab_size=arguments.vocab_size,
        text=arguments.text,
        tokenizer_path=arguments.tokenizer,
        num_tokens=arguments.num_tokens,
        resume=arguments.resume,
        file=arguments.config,
        overrides=arguments.override,
        flags=flags,
    )
    if os.environ.get("RANK", "0") != "0":
        return  # rank 0 says it
    last = history.rows[-1]
    loss = "none, as every step was skipped" if history.train_loss is None else f"{history.train_loss:.4f}"
    print(f"step {last['step']}: training loss {loss}, validation loss {history.valid_loss:.4f}")
    print(f"checkpoint: {history.checkpoint}")


def generate(arguments: argparse.Namespace) -> None:
    from lmsys.config import GenerateConfig
    from lmsys.generate import generate_texts
    from lmsys.pipeline import load_run

    settings = GenerateConfig(
        prompts=tuple(arguments.prompt),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model, tokenizer = load_run(arguments.checkpoint, arguments.tokenizer, device=arguments.device)
    _, written = generate_texts(
        model,
        tokenizer,
        settings.prompts,
        settings,
        use_cache=not arguments.no_cache,
        cuda_graph=model.token_embeddings.weight.is_cuda,
        write=lambda piece: print(piece, end="", flush=True),
    )
    print(written.speed(), file=sys.stderr)


def export(arguments: argparse.Namespace) -> None:
    from lmsys import interchange
    from lmsys.pipeline import load_run

    model, tokenizer = load_run(arguments.checkpoint, arguments.tokenizer, device="cpu")
    _print_written([interchange.export_llama(model, tokenizer, arguments.output)])


def import_hf(arguments: argparse.Namespace) -> None:
    from lmsys import interchange

    _print_written([interchange.import_llama(arguments.input, arguments.output)])


def attention_sweep(arguments: argparse.Namespace) -> None:
    from lmsys.bench import attention
    from lmsys.records import artifacts_dir

    sweep = attention.settings(
        scale=arguments.scale,
        groups=arguments.groups,
        kernels=arguments.kernels,
        custom_tiers=arguments.custom_tiers,
        batch=arguments.batch,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        dtypes=arguments.dtypes,
        causal=None if arguments.causal is None else [value == "true" for value in arguments.causal],
        passes=arguments.passes,
        warmup=arguments.warmup,
        iterations=arguments.iters,
        device=arguments.device,
        seed=arguments.seed,
        keep=arguments.keep,
        compile_ahead=arguments.compile_ahead,
    )
    folder = artifacts_dir(arguments.machine)
    frame = attention.run(sweep, folder, on_row=lambda row: print(attention.row_line(row), flush=True))
    for sentence in attention.conclusions(frame):
        print(sentence.replace("**", ""))
    _print_written([folder / "attention_sweep_results.csv", *attention.write_report(frame, folder).values()])


def attention_accuracy(arguments: argparse.Namespace) -> None:
    from lmsys.bench import accuracy
    from lmsys.records import artifacts_dir

    sweep = accuracy.settings(
        scale=arguments.scale,
        kernels=arguments.kernels,
        cases=arguments.cases,
        longest=arguments.longest,
        workers=arguments.workers,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame = accuracy.run(sweep, folder, on_row=lambda row: print(accuracy.row_line(row), flush=True))
    for sentence in accuracy.conclusions(frame):
        print(sentence.replace("**", ""))
    _print_written([folder / f"{accuracy.NAME}.csv", accuracy.write_report(frame, folder)])


def leaderboard(arguments: argparse.Namespace) -> None:
    from lmsys.bench import board_2026
    from lmsys.bench import leaderboard as board_2025
    from lmsys.records import artifacts_dir

    boards = board_2025 if arguments.board == "2025" else board_2026
    if arguments.plan:
        print(board_2026.explain_plan(board_2026.paper_plan(arguments.margin_gib)))
        return
    own = {"2025": ("warmup_ms", "rep_ms"), "2026": ("margin_gib", "timed_steps")}[arguments.board]
    board = boards.settings(
        scale=arguments.scale,
        implementations=arguments.implementations,
        device=arguments.device,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in own},
    )
    folder = artifacts_dir(arguments.machine)
    frame = boards.run(board, folder, on_row=lambda row: print(boards.row_line(row), flush=True))
    for sentence in boards.conclusions(frame):
        print(sentence.replace("**", ""))
    _print_written([folder / f"{board_2025.NAME}.csv", boards.write_report(frame, folder)])


def lm_matrix(arguments: argparse.Namespace) -> None:
    from lmsys.bench import matrix
    from lmsys.records import artifacts_dir

    own = {name: getattr(arguments, name) for name in ("d_model", "d_ff", "num_layers", "num_heads")}
    chosen = matrix.settings(
        scale=arguments.scale,
        kernels=arguments.kernels,
        wrappers=arguments.wrappers,
        sizes=arguments.sizes,
        gpus=arguments.gpus,
        steps=arguments.steps,
        epochs=arguments.epochs,
        timed_steps=arguments.timed_steps,
        batch=arguments.batch_size,
        context_length=arguments.context_length,
        vocab_size=arguments.vocab_size,
        shape={name: value for name, value in own.items() if value is not None} or None,
        dtype=arguments.dtype,
        compiled=arguments.compile,
        learning_rate=arguments.learning_rate,
        train_tokens=arguments.train_tokens,
        valid_tokens=arguments.valid_tokens,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame, losses = matrix.run(chosen, folder, on_row=lambda row: print(matrix.row_line(row), flush=True))
    for sentence in matrix.conclusions(frame):
        print(sentence.replace("**", ""))
    _print_written([folder / f"{matrix.NAME}.csv", *matrix.write_report(frame, losses, folder).values()])


def train_step(arguments: argparse.Namespace) -> None:
    from lmsys.bench import train_step as steps
    from lmsys.records import artifacts_dir

    chosen = steps.settings(
        scale=arguments.scale,
        sizes=arguments.sizes,
        options=arguments.options,
        batch=arguments.batch_size,
        context_length=arguments.context_length,
        vocab_size=arguments.vocab_size,
        dtype=arguments.dtype,
        compiled=arguments.compile,
        kernel=arguments.attention_kernel,
        loss_steps=arguments.loss_steps,
        timed_steps=arguments.timed_steps,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame, losses = steps.run(chosen, folder, on_row=lambda row: print(steps.row_line(row), flush=True))
    for sentence in steps.conclusions(frame, losses):
        print(sentence.replace("**", ""))
    _print_written([folder / f"{steps.NAME}.csv", *steps.write_report(frame, losses, folder).values()])


def race(arguments: argparse.Namespace) -> None:
    from lmsys.bench import race as races
    from lmsys.records import artifacts_dir

    chosen = races.settings(
        scale=arguments.scale,
        arms=arguments.arms,
        gpus=arguments.gpus,
        minutes=arguments.minutes,
        steps=arguments.steps,
        size=arguments.size,
        batch=arguments.batch_size,
        context_length=arguments.context_length,
        vocab_size=arguments.vocab_size,
        text_path=arguments.text,
        text_mb=arguments.text_mb,
        dtype=arguments.dtype,
        compiled=arguments.compile,
        naive_kernel=arguments.naive_kernel,
        kernel=arguments.attention_kernel,
        options=arguments.options,
        learning_rate=arguments.learning_rate,
        eval_interval=arguments.eval_interval,
        run_dir=arguments.run_dir,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame = races.run(chosen, folder, on_row=lambda row: print(races.row_line(row), flush=True))
    for sentence in races.conclusions(frame):
        print(sentence)
    _print_written([folder / f"{races.NAME}.csv", *races.write_report(frame, folder).values()])


def benchmark(arguments: argparse.Namespace) -> None:
    from lmsys.bench import model, model_report
    from lmsys.records import artifacts_dir

    chosen = model.settings(
        scale=arguments.scale,
        sizes=arguments.sizes,
        contexts=arguments.contexts,
        dtypes=arguments.dtypes,
        modes=arguments.modes,
        compiled=arguments.compile,
        attention_kernels=arguments.attention_kernels,
        checkpoint=arguments.checkpoint,
        batch=arguments.batch_size,
        vocab_size=arguments.vocab_size,
        warmup=arguments.warmup,
        steps=arguments.steps,
        budget_s=arguments.budget_s,
        nvtx=arguments.nvtx,
        memory_profile=arguments.memory_profile,
        trace=arguments.trace,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame = model.run(
        chosen,
        folder,
        output_json=arguments.output_json,
        on_row=lambda row: print(model_report.row_line(row), flush=True),
    )
    for sentence in model_report.conclusions(frame):
        print(sentence.replace("**", ""))
    _print_written([folder / f"{model.NAME}.csv", *model_report.write_report(frame, folder).values()])


def compare(arguments: argparse.Namespace) -> int:
    from lmsys import records

    found = records.compare(arguments.a, arguments.b, threshold=arguments.threshold)
    print(records.comparison_table(found), end="")
    worse = found[found.verdict.isin(records.VERDICTS[:2])]
    counts = ", ".join(f"{(found.verdict == name).sum()} {name}" for name in records.VERDICTS)
    print(f"{len(found)} rows: {counts}")
    return 1 if len(worse) else 0


def collectives(arguments: argparse.Namespace) -> None:
    from lmsys import plots
    from lmsys.bench import collectives
    from lmsys.records import artifacts_dir

    chosen = collectives.settings(
        scale=arguments.scale,
        ops=arguments.ops,
        sizes_mib=arguments.sizes_mib,
        gpus=arguments.gpus,
        samples=arguments.samples,
        device=arguments.device,
    )
    folder = artifacts_dir(arguments.machine)
    frame = collectives.run(chosen, folder, on_row=lambda row: print(collectives.row_line(row), flush=True))
    for sentence in collectives.conclusions(frame):
        print(sentence)
    figure = plots.save(plots.collectives(frame), folder / "collectives.png")
    _print_written([folder / f"{collectives.NAME}.csv", figure])


def faults(arguments: argparse.Namespace) -> int:
    from lmsys.bench import faults
    from lmsys.records import artifacts_dir

    chosen = faults.settings(
        scale=arguments.scale,
        kinds=arguments.kinds,
        kills=arguments.kills,
        trials=arguments.trials,
        rounds=arguments.rounds,
        trainers=arguments.trainers,
        device=arguments.device,
        seed=arguments.seed,
    )
    folder = artifacts_dir(arguments.machine)
    frame = faults.run(chosen, folder, on_row=lambda row: print(faults.row_line(row), flush=True))
    saving = faults.measure_saving(chosen, folder, on_row=lambda row: print(faults.row_line(row), flush=True))
    for sentence in faults.conclusions(frame, saving):
        print(sentence.replace("**", ""))
    written = [folder / f"{faults.NAME}.csv", folder / f"{faults.SAVING_NAME}.csv"]
    _print_written([*written, faults.write_report(frame, saving, folder)])
    return 1 if (frame.status == "error").any() else 0


def bench_tokenizer(arguments: argparse.Namespace) -> None:
    from lmsys.bench import tokenizer
    from lmsys.records import artifacts_dir

    folder = artifacts_dir(arguments.machine)
    rows = tokenizer.run(
        folder,
        text_path=arguments.text,
        vocab_size=arguments.vocab_size,
        encode_mb=arguments.encode_mb,
        num_workers=arguments.workers,
        repeats=arguments.repeats,
    )
    print(tokenizer.table(rows))


def report(arguments: argparse.Namespace) -> None:
    from lmsys import report as reports

    if not arguments.site_only:
        for notebook in arguments.notebooks or [name for name in reports.RUNS if name not in reports.ON_DEMAND]:
            reports.run_notebook(notebook, scale=arguments.scale, machine=arguments.machine)
    if not arguments.no_site:
        print(f"site: {reports.build_site()}")


def _print_written(paths: Sequence[Path]) -> None:
    print("written: " + " ".join(os.path.relpath(path) for path in paths))


# --- Arguments ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from lmsys import __version__
    from lmsys.config import DATASET_MODES, MODEL_SIZES, SCALES

    parser = argparse.ArgumentParser(
        prog="python -m lmsys",
        description="Fast Transformer language-model training, written from scratch and measured beside the best.",
        epilog="python -m lmsys COMMAND --help describes a command. The notebooks in notebooks/ call the same functions.",
    )
    parser.add_argument("--version", action="version", version=f"lmsys {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, summary: str, description: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}. {description}",
            epilog=f"example:\n  python -m lmsys {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(function=function)
        return added

    def add_machine(added: argparse.ArgumentParser) -> None:
        added.add_argument("--machine", help="results go to artifacts/MACHINE (default: LMSYS_MACHINE, else local)")

    def add_scale(added: argparse.ArgumentParser, default: str | None) -> None:
        added.add_argument(
            "--scale",
            choices=SCALES,
            default=default,
            help="preset; auto is full on a CUDA GPU, else cpu (default: auto)",
        )

    def add_config(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--override",
            action="extend",
            nargs="+",
            default=[],
            metavar="section.key=value",
            help="set settings over the file's; a value is JSON, or a plain string; may be repeated",
        )
        added.add_argument("--attention_kernel", metavar="K", help="attention kernel by name (train.attention_kernel)")
        added.add_argument("--ddp_wrapper", metavar="W", help="data-parallel wrapper by name (train.ddp_wrapper)")
        added.add_argument(
            "--sharded_optimizer",
            action="store_true",
            default=None,
            help="ZeRO-1: each process keeps its share of the optimizer's state (train.sharded_optimizer)",
        )
        added.add_argument("--run_dir", help="folder of the run; a relative one lies in the repository")

    added = command(
        "pipeline",
        pipeline,
        "Text to a trained model",
        "Data, tokenizer, token files, training, evaluation, stories.\n"
        "Stages whose outputs exist and match their settings are skipped; training resumes from its newest checkpoint.\n"
        "Settings: preset of the scale < --config file < --override < named flags.\n"
        f"data.dataset_mode is one of {', '.join(DATASET_MODES)}.",
        "pipeline --text my.txt --override train.steps=500",
    )
    added.add_argument("--config", help="JSON file (default: lmsys/configs/default_pipeline.json)")
    add_scale(added, None)
    added.add_argument("--text", help="your own UTF-8 text file: data.dataset_mode=local_text with this data.text_path")
    add_config(added)
    added.add_argument(
        "--processes", type=int, help="to train in; with a --ddp_wrapper, one a GPU if not given (train.processes)"
    )
    added.add_argument(
        "--skip_data", action="store_true", help="take the run folder's tokenizer and token files as they are"
    )
    add_machine(added)

    added = command(
        "train",
        train,
        "Train a model on token files, random tokens or a text file",
        "A model of a named size or of a --config, without the pipeline's stages.\n"
        "For several processes: torchrun --nproc_per_node=N -m lmsys train ... --ddp_wrapper flashddp.",
        "train --size small --epochs 2 --batch_size 4 --context_length 512 --dtype bf16",
    )
    added.add_argument(
        "--size", help=f"model size: {', '.join(MODEL_SIZES)} (default: the --config's model, else small)"
    )
    added.add_argument("--context_length", type=int, help="tokens of a sequence (default: the --config's, else 512)")
    added.add_argument("--vocab_size", type=int, help="vocabulary (default: the size's own, or the tokenizer's)")
    added.add_argument("--text", help="a UTF-8 file to train on (default: the token files, else random tokens)")
    added.add_argument("--train_tokens", help=".npy token file to train on (data.train_tokens_path)")
    added.add_argument("--valid_tokens", help=".npy token file to validate with (data.valid_tokens_path)")
    added.add_argument("--tokenizer", help="tokenizer.json of the tokens (default, for --text: one is trained on it)")
    added.add_argument("--num_tokens", type=int, default=1_000_000, help="random tokens to train on (default: 1000000)")
    added.add_argument("--steps", type=int, help="optimizer steps (default: from --epochs)")
    added.add_argument("--epochs", type=float, help="passes over the tokens (default: 1, unless --steps)")
    added.add_argument("--batch_size", type=int, help="sequences a batch")
    added.add_argument("--learning_rate", type=float, help="highest learning rate")
    added.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="bf16 and fp16 are autocast; parameters stay fp32"
    )
    added.add_argument("--compile", action="store_true", default=None, help="torch.compile, block by block")
    added.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    added.add_argument("--resume", action="store_true", help="continue the run folder's newest checkpoint")
    added.add_argument("--config", help="JSON file of settings under the flags")
    add_config(added)

    added = command(
        "generate",
        generate,
        "Write text with a trained model",
        "Prints the text of a checkpoint's model as it is written, and its speed on standard error. Several prompts are continued together.",
        'generate --checkpoint runs/pipeline-cpu --prompt "Once upon a time"',
    )
    added.add_argument("--checkpoint", required=True, help="a checkpoint, or a run folder (then its newest good one)")
    added.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    added.add_argument("--tokenizer", help="tokenizer.json (default: the run folder's)")
    added.add_argument("--max_new_tokens", type=int, default=200, help="tokens to write at most (default: 200)")
    added.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    added.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest; 0 is off (default: 0)")
    added.add_argument("--top_p", type=float, default=0.95, help="nucleus sampling; 1 is off (default: 0.95)")
    added.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    added.add_argument("--no_cache", action="store_true", help="read the whole window anew for each token, to compare")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    added = command(
        "export",
        export,
        "Write a model in Hugging Face's Llama format",
        "A folder for transformers' AutoModelForCausalLM and AutoTokenizer: config.json, model.safetensors, tokenizer.json and their\n"
        "companions. The weights stay fp32; the logits are the same.",
        "export --checkpoint runs/pipeline-cpu --output exported",
    )
    added.add_argument("--checkpoint", required=True, help="a checkpoint, or a run folder (then its newest good one)")
    added.add_argument("--output", required=True, help="the folder to write; it must not exist, or be empty")
    added.add_argument("--tokenizer", help="tokenizer.json (default: the run folder's)")

    added = command(
        "import-hf",
        import_hf,
        "Make a run folder of a model in Hugging Face's Llama format",
        "Its config.json, safetensors and byte-level tokenizer.json; nothing is unpickled. What our model cannot hold is refused by name.",
        "import-hf --input exported --output runs/imported",
    )
    added.add_argument("--input", required=True, help="the model's folder")
    added.add_argument("--output", required=True, help="the run folder to write; it must not exist, or be empty")

    added = command(
        "attention-sweep",
        attention_sweep,
        "Compare attention kernels over sequence lengths",
        "Each point is checked against float64, then timed; running out of memory is a row.\n"
        "custom_tiers, batch, heads, kv_heads and head_dim are those of the group tiers, which they select.",
        "attention-sweep --custom_tiers 128:64 256:128 --warmup 10 --iters 50",
    )
    add_scale(added, "auto")
    added.add_argument(
        "--groups", nargs="+", metavar="G", help="throughput, grouped_query, few_blocks, tiers (default: the scale's)"
    )
    added.add_argument(
        "--keep", action="store_true", help="keep the results' rows of groups that this run does not measure"
    )
    added.add_argument(
        "--compile_ahead", type=int, help="processes that compile before the timing (default: the scale's)"
    )
    added.add_argument("--kernels", nargs="+", metavar="K", help="kernels by name (default: all)")
    added.add_argument(
        "--custom_tiers", nargs="+", metavar="Q:K", help="lengths, powers of two, in place of the scale's"
    )
    for name in ("batch", "heads", "kv_heads", "head_dim"):
        added.add_argument(f"--{name}", type=int, help=f"{name} of the inputs (default: the scale's)")
    added.add_argument("--dtypes", nargs="+", metavar="D", help="fp32, fp16, bf16 (default: the scale's)")
    added.add_argument("--causal", nargs="+", choices=("true", "false"), help="masks to run (default: the scale's)")
    added.add_argument(
        "--passes", nargs="+", metavar="P", help="forward, backward, forward_backward (default: forward)"
    )
    added.add_argument("--warmup", type=int, help="untimed calls of each point")
    added.add_argument("--iters", type=int, help="timed calls of each point")
    added.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_machine(added)

    added = command(
        "attention-accuracy",
        attention_accuracy,
        "Check our attention kernels on random shapes against float64",
        "Output, log-sum-exp and gradients, beside the error of PyTorch's attention; a failure is a row.",
        "attention-accuracy --cases 40 --kernels flash_attention_triton",
    )
    add_scale(added, "auto")
    added.add_argument(
        "--kernels", nargs="+", metavar="K", help="kernels by name (default: the FlashAttention ones of ours)"
    )
    added.add_argument("--cases", type=int, help="how many random problems (default: the scale's)")
    added.add_argument("--longest", type=int, help="most queries or keys (default: the scale's)")
    added.add_argument("--workers", type=int, help="processes; 0: this one only (default: the scale's)")
    added.add_argument("--seed", type=int, default=0, help="of cases and inputs (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_machine(added)

    added = command(
        "leaderboard",
        leaderboard,
        "Time what the course's boards time: attention (2025), or a training step of an 8B model on two GPUs (2026)",
        "2025: forward and backward under torch.compile at 16,384 tokens, every implementation. 2026: the step whose activations a planner "
        "chooses, beside PyTorch's own. Smaller shapes without the GPUs.",
        "leaderboard --board 2026 --scale full",
    )
    add_scale(added, "auto")
    added.add_argument("--board", choices=("2025", "2026"), default="2025", help="which board (default: 2025)")
    added.add_argument(
        "--implementations",
        nargs="+",
        metavar="K",
        help="2025: attention kernels by name; 2026: lmsys, torch_native (default: all)",
    )
    added.add_argument("--warmup_ms", type=int, default=200, help="2025: do_bench's warm-up, ms (default: 200)")
    added.add_argument("--rep_ms", type=int, default=1000, help="2025: do_bench's sampling time, ms (default: 1000)")
    added.add_argument("--timed_steps", type=int, help="2026: steps that are timed (default: the scale's)")
    added.add_argument(
        "--margin_gib", type=float, default=4.0, help="2026: memory that the plan leaves free, GiB (default: 4)"
    )
    added.add_argument(
        "--plan", action="store_true", help="2026: print the plan for two H200s, which needs no GPU, and end"
    )
    added.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or (2025) cuda:N")
    add_machine(added)

    added = command(
        "lm-matrix",
        lm_matrix,
        "Time a training step under kernels, data-parallel wrappers, model sizes and numbers of GPUs",
        "Starts its processes itself. All points train on the same data, and must reach the same loss, before they are timed.",
        "lm-matrix --sizes gpt2 --wrappers flashddp torch_ddp --gpus 1 2 --batch_size 32",
    )
    add_scale(added, "auto")
    added.add_argument("--kernels", nargs="+", metavar="K", help="attention kernels (default: the scale's)")
    added.add_argument(
        "--wrappers", nargs="+", metavar="W", help="of several GPUs; NAME+zero1 shards the optimizer (default: all)"
    )
    added.add_argument("--sizes", nargs="+", metavar="S", help=f"model sizes: {', '.join(MODEL_SIZES)}")
    for name in ("d_model", "d_ff", "num_layers", "num_heads"):
        added.add_argument(f"--{name}", type=int, help=f"{name} of a model of your own, in place of --sizes")
    added.add_argument("--gpus", nargs="+", type=int, metavar="N", help="numbers of GPUs (default: 1, 2, 4, 8)")
    added.add_argument("--train_tokens", help="a .npy file of token ids (default: a pattern that can be learned)")
    added.add_argument("--valid_tokens", help="a .npy file of token ids for a validation loss")
    added.add_argument("--steps", type=int, help="of training before the timing (default: the scale's)")
    added.add_argument("--epochs", type=float, help="passes over --train_tokens, instead of --steps")
    added.add_argument("--timed_steps", type=int, help="default: the scale's")
    added.add_argument("--batch_size", type=int, help="sequences a GPU (default: the size's)")
    added.add_argument("--context_length", type=int, help="tokens of a sequence (default: the size's)")
    added.add_argument("--vocab_size", type=int, help="vocabulary (default: the size's)")
    added.add_argument("--learning_rate", type=float, help="default: the scale's")
    added.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 is autocast; parameters stay fp32")
    added.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile, block by block")
    added.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_machine(added)

    added = command(
        "train-step",
        train_step,
        "Time the trainer's step beside plain PyTorch's, and without each of its options",
        "All from the same weights on the same data, losses compared. The options are those of the config's train section.",
        "train-step --sizes gpt2 --options fused_loss fused_optimizer bf16_parameters",
    )
    add_scale(added, "auto")
    added.add_argument("--sizes", nargs="+", metavar="S", help=f"model sizes: {', '.join(MODEL_SIZES)}")
    added.add_argument(
        "--options", nargs="+", metavar="O", help="that are on, and taken away one by one (default: all)"
    )
    added.add_argument("--batch_size", type=int, help="sequences (default: the size's)")
    added.add_argument("--context_length", type=int, help="tokens of a sequence (default: the scale's)")
    added.add_argument("--vocab_size", type=int, help="vocabulary (default: the size's)")
    added.add_argument("--dtype", choices=("fp32", "bf16"), help="default: the scale's")
    added.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours by block, PyTorch's whole")
    added.add_argument("--attention_kernel", metavar="K", help="ours; PyTorch's is its own (default: the scale's)")
    added.add_argument("--loss_steps", type=int, help="of training before the timing (default: the scale's)")
    added.add_argument("--timed_steps", type=int, help="default: the scale's")
    added.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_machine(added)

    added = command(
        "race",
        race,
        "Train one model by a naive step, by ours, and by ours on several GPUs, to the same loss",
        "The same weights, batches and learning rates in all arms; each ends with the schedule or at its limit of minutes.",
        "race --minutes 2 --steps 1500",
    )
    add_scale(added, "auto")
    added.add_argument(
        "--arms",
        nargs="+",
        metavar="A",
        default=["ours", "ours_ddp", "naive"],
        help="in this order (default: ours ours_ddp naive)",
    )
    added.add_argument("--gpus", type=int, default=2, help="of ours_ddp; processes on a CPU (default: 2)")
    added.add_argument("--minutes", type=float, help="of training that an arm may take (default: the scale's)")
    added.add_argument("--steps", type=int, help="of the schedule (default: the scale's)")
    added.add_argument("--size", metavar="S", help=f"of the model: {', '.join(MODEL_SIZES)} (default: the scale's)")
    added.add_argument("--batch_size", type=int, help="sequences of a step, over all GPUs (default: the scale's)")
    added.add_argument("--context_length", type=int, help="tokens of a sequence (default: the scale's)")
    added.add_argument("--vocab_size", type=int, help="of the tokenizer that is trained (default: the scale's)")
    added.add_argument("--text", help="a UTF-8 file (default: stories that are generated)")
    added.add_argument("--text_mb", type=float, help="how much to generate, MB (default: the scale's)")
    added.add_argument("--dtype", choices=("fp32", "bf16"), help="of all arms (default: the scale's)")
    added.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours by block (default: the scale's)")
    added.add_argument("--attention_kernel", metavar="K", help="of ours (default: the scale's)")
    added.add_argument(
        "--naive_kernel",
        metavar="K",
        default="scaled_dot_prod_attention",
        help="of naive (default: scaled_dot_prod_attention)",
    )
    added.add_argument("--options", nargs="+", metavar="O", help="of the trainer that ours has (default: the scale's)")
    added.add_argument("--learning_rate", type=float, help="default: the scale's")
    added.add_argument("--eval_interval", type=int, help="steps (default: the scale's)")
    added.add_argument("--run_dir", help="where text, tokenizer and token files are kept (default: runs/race-SCALE)")
    added.add_argument("--seed", type=int, default=0, help="of weights, data and stories (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_machine(added)

    added = command(
        "benchmark",
        benchmark,
        "Time the model: forward pass, forward and backward, full training step",
        "Over sizes, contexts, precisions, compiled or not. Where one of these lists is given, every combination of them is measured.\n"
        "For Nsight Systems: nsys profile --trace=cuda,nvtx python -m lmsys benchmark --nvtx ...",
        "benchmark --sizes small medium --contexts 256 1024 --dtypes tf32 bf16 --modes full_step --compile no blocks",
    )
    add_scale(added, "auto")
    added.add_argument("--sizes", nargs="+", metavar="S", help=f"model sizes: {', '.join(MODEL_SIZES)}")
    added.add_argument("--contexts", nargs="+", type=int, metavar="T", help="tokens of a sequence")
    added.add_argument("--dtypes", nargs="+", metavar="D", help="fp32, tf32, bf16, fp16 (the last two autocast)")
    added.add_argument("--modes", nargs="+", metavar="M", help="forward, forward_backward, full_step (default: all)")
    added.add_argument("--compile", nargs="+", metavar="C", help="no, blocks, model (default: no)")
    added.add_argument(
        "--attention_kernels", nargs="+", metavar="K", default=["vectorized_torch"], help="default: vectorized_torch"
    )
    added.add_argument("--checkpoint", type=int, metavar="N", help="activation checkpointing of groups of N blocks")
    added.add_argument("--batch_size", type=int, help="sequences (default: the scale's)")
    added.add_argument("--vocab_size", type=int, help="vocabulary (default: the size's)")
    added.add_argument("--warmup", type=int, help="untimed steps of a point (default: 5)")
    added.add_argument("--steps", type=int, help="timed steps of a point (default: 10)")
    added.add_argument(
        "--budget_s",
        type=float,
        help="a slow point gets fewer steps, about so many seconds of them (default: the scale's)",
    )
    added.add_argument("--nvtx", action="store_true", help="named ranges for Nsight Systems and PyTorch's profiler")
    added.add_argument(
        "--memory_profile",
        action="store_true",
        help="of a step of each point: allocator snapshot (.pickle, GPU) and figure",
    )
    added.add_argument("--trace", action="store_true", help="of a step of each point: Chrome trace")
    added.add_argument("--output_json", metavar="PATH", help="also one JSON file with all samples")
    added.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_machine(added)

    added = command(
        "compare",
        compare,
        "Compare two result files row by row",
        "Prints a table with both medians, their 20th and 80th percentile, and the ratio. Exit code 1 where a row of B is slower by more than\n"
        "the threshold and beyond both spreads, or ran in A and does not in B.",
        "compare artifacts/h200/model_benchmark_results.csv artifacts/local/model_benchmark_results.csv --threshold 0.05",
    )
    added.add_argument("a", metavar="A", help="a result file (.csv), the reference")
    added.add_argument("b", metavar="B", help="another of the same kind")
    added.add_argument("--threshold", type=float, default=0.05, help="slowdown that counts, as a share (default: 0.05)")

    added = command(
        "collectives",
        collectives,
        "Time all-reduce, reduce-scatter and all-gather over sizes and numbers of GPUs",
        "Bus bandwidth as nccl-tests counts it; NCCL on GPUs, Gloo between processes on a CPU.",
        "collectives --gpus 2 4 --sizes_mib 1 64 1024",
    )
    add_scale(added, "auto")
    added.add_argument("--ops", nargs="+", metavar="OP", help="all_reduce, reduce_scatter, all_gather (default: all)")
    added.add_argument("--sizes_mib", nargs="+", type=float, metavar="MIB", help="message sizes (default: the scale's)")
    added.add_argument("--gpus", nargs="+", type=int, metavar="N", help="numbers of GPUs (default: 2, 4, 8)")
    added.add_argument("--samples", type=int, help="of each point at most (default: the scale's)")
    added.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_machine(added)

    added = command(
        "faults",
        faults,
        "Kill, stop and starve training processes, and check that nothing is lost",
        "Each fault is tried several times; the run that goes on is compared with an undisturbed one. Then the time of a step with\n"
        "checkpoints written in the background, and with ones that it waits for. Exit code 1 where something was lost.",
        "faults --kinds sigkill sigkill_in_save --kills 20",
    )
    add_scale(added, "auto")
    added.add_argument("--kinds", nargs="+", metavar="F", help="faults by name (default: the scale's)")
    added.add_argument("--kills", type=int, help="times that each kind of SIGKILL is tried (default: the scale's)")
    added.add_argument("--trials", type=int, help="times that each other fault is tried (default: the scale's)")
    added.add_argument("--rounds", type=int, help="of runs in which saving is timed (default: the scale's)")
    added.add_argument("--trainers", default="cpu", help="device of the runs that are disturbed (default: cpu)")
    added.add_argument("--seed", type=int, default=0, help="of moments and runs (default: 0)")
    added.add_argument("--device", default="auto", help="on which saving is timed: auto, cpu, cuda or cuda:N")
    add_machine(added)

    added = command(
        "bench-tokenizer",
        bench_tokenizer,
        "Time tokenizer training and encoding beside tokenizers and tiktoken",
        "All on the same text, each in processes of its own, ids compared.",
        "bench-tokenizer --vocab_size 10000",
    )
    added.add_argument("--text", help="a UTF-8 file (default: 52 MB of generated text with the statistics of English)")
    added.add_argument("--vocab_size", type=int, default=10_000, help="vocabulary to train (default: 10000)")
    added.add_argument("--encode_mb", type=float, default=20, help="how much of the text to encode, MB (default: 20)")
    added.add_argument(
        "--workers", type=int, default=2, help="processes or threads of each implementation (default: 2)"
    )
    added.add_argument("--repeats", type=int, default=3, help="samples of each figure (default: 3)")
    add_machine(added)

    added = command(
        "report",
        report,
        "Execute the notebooks and build the site",
        "Executed notebooks go to book/MACHINE/, results to artifacts/MACHINE/, the site to book/_build/html/.",
        "report --scale cpu",
    )
    added.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="notebooks by name (default: all but speedrun_tinystories)"
    )
    add_scale(added, "auto")
    group = added.add_mutually_exclusive_group()
    group.add_argument("--no_site", action="store_true", help="execute the notebooks only")
    group.add_argument("--site_only", action="store_true", help="build the site only")
    add_machine(added)
    return parser


if __name__ == "__main__":
    sys.exit(main())
