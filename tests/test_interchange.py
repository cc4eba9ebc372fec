"""Hugging Face's Llama format: transformers computes our logits from our export, and we compute its from its own."""

import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmsys import interchange
from lmsys.__main__ import main
from lmsys.config import END_OF_TEXT, ModelConfig
from lmsys.data.tokenizer import Tokenizer
from lmsys.generate import generate
from lmsys.model import TransformerLM
from lmsys.train import checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GPT2 = SHARED / "gpt2_vocab.json", SHARED / "gpt2_merges.txt"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat, and it's the hat of the rat. 1234 12 é é\n" * 20 + END_OF_TEXT)
    return Tokenizer.train(path, 280, num_workers=1)


def made(tokenizer: Tokenizer, **other) -> TransformerLM:
    """A small model whose every weight matters: gains differ from 1."""
    torch.manual_seed(0)
    shape = {"d_model": 48, "d_ff": 80, "num_layers": 3, "num_heads": 4, "context_length": 32}
    model = TransformerLM(ModelConfig(**(shape | {"vocab_size": tokenizer.vocab_size} | other))).eval()
    for name, weight in model.named_parameters():
        if "ln" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


SHAPES = {
    "separate": {},
    "tied": {"tie_embeddings": True},
    "theta, padded": {"rope_theta": 500_000.0, "vocab_size": 320},
    "one head": {"num_heads": 1, "num_layers": 1},
}


@pytest.mark.parametrize("other", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_our_logits(tmp_path, tokenizer, other):
    transformers = pytest.importorskip("transformers")
    model = made(tokenizer, **other)
    folder = interchange.export_llama(model, tokenizer, tmp_path / "out")
    assert {file.name for file in folder.iterdir()} == FILES
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM" and not any(loading.values())
    assert theirs.num_parameters() == model.num_parameters()
    ids = torch.randint(model.config.vocab_size, (3, 32))
    with torch.no_grad():
        ours = model(ids)
        assert (theirs(ids).logits - ours).abs().max() < 1e-4 < ours.std()
        prompt = ids[:1, :5]
        written = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    end = tokenizer.token_id(END_OF_TEXT)
    assert theirs.generation_config.eos_token_id == theirs.config.bos_token_id == end
    mine = generate(model, prompt[0].tolist(), max_new_tokens=20, temperature=0, stop_id=end)
    assert written[0, 5:].tolist() == mine + [end] * (len(mine) < 20)


def test_we_compute_the_logits_of_transformers_own_files(tmp_path, tokenizer):
    """In bf16, in several files, with settings that it leaves out."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    end = tokenizer.token_id(END_OF_TEXT)
    config = transformers.LlamaConfig(
        vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, rms_norm_eps=1e-5, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    tokenizer.export_huggingface(tmp_path / "in" / "tokenizer.json")
    folder = interchange.import_llama(tmp_path / "in", tmp_path / "run")
    model, _ = checkpoint.load_model(checkpoint.latest(folder / "checkpoints"))
    ids = torch.randint(301, (2, 24))
    with torch.no_grad():
        expected = theirs.float()(ids).logits
        assert (model(ids) - expected).abs().max() < 1e-4 < expected.std()


@pytest.mark.parametrize("other", SHAPES.values(), ids=SHAPES)
def test_there_and_back_is_the_same_model(tmp_path, tokenizer, other):
    model = made(tokenizer, **other)
    out = interchange.export_llama(model, tokenizer, tmp_path / "out")
    run = interchange.import_llama(out, tmp_path / "deeper" / "run")
    loaded, config = checkpoint.load_model(run / "checkpoints" / "step-00000000")
    assert config == model.config
    for (name, weight), (again, back) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == again and torch.equal(weight, back), name
    back = Tokenizer.load(run / "tokenizer.json")
    assert (back.vocab, back.merges, back.special_tokens) == (
        *(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens),
    )
    twice = interchange.export_llama(loaded, back, tmp_path / "twice")
    for file in FILES:
        assert (twice / file).read_bytes() == (out / file).read_bytes(), file


# --- The tokenizer --------------------------------------------------------------------------------


def texts() -> list[str]:
    """Real text, and random bytes as text: each as a Latin-1 character, and as UTF-8 as far as they are."""
    draw = random.Random(0)
    noise = draw.randbytes(20_000)
    symbols = "".join(chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(5000))
    samples = [noise.decode("latin-1"), noise.decode("utf-8", "replace"), symbols, "", f"a{END_OF_TEXT} {END_OF_TEXT}b"]
    shakespeare = SHARED / "tinyshakespeare.txt"
    return samples + ([shakespeare.read_text()[:300_000]] if shakespeare.exists() else [])


@pytest.mark.parametrize("which", ["trained", "gpt2"])
def test_tokenizers_and_transformers_give_our_ids(tmp_path, tokenizer, which):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    if which == "gpt2":
        if not all(path.exists() for path in GPT2):
            pytest.skip("GPT-2's files are not in the shared data folder")
        tokenizer = Tokenizer.from_gpt2(*GPT2)
    model = made(tokenizer, d_model=4, d_ff=4, num_layers=1, num_heads=1)
    out = interchange.export_llama(model, tokenizer, tmp_path / "out")
    fast = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(out)
    back = Tokenizer.from_huggingface(out / "tokenizer.json")
    assert (auto.bos_token, auto.eos_token, auto.model_max_length) == (END_OF_TEXT, END_OF_TEXT, 32)
    for text in texts():
        ids = tokenizer.encode(text)
        assert fast.encode(text).ids == ids == back.encode(text)
        assert auto(text, verbose=False)["input_ids"] == ids
        assert fast.decode(ids, skip_special_tokens=False) == auto.decode(ids) == text
    ids = random.Random(1).choices(range(tokenizer.vocab_size), k=2000)  # not UTF-8
    assert fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == auto.decode(ids)
    again = tmp_path / "again.json"
    fast.save(str(again))  # as `tokenizers` itself writes it
    assert Tokenizer.from_huggingface(again).merges == tokenizer.merges


TOKENIZER_CHANGES = {
    "the model's type is \"Unigram\"": lambda value: value["model"].update(type="Unigram"),
    "byte_fallback is true": lambda value: value["model"].update(byte_fallback=True),
    "ignore_merges is true": lambda value: value["model"].update(ignore_merges=True),
    "dropout is 0.1": lambda value: value["model"].update(dropout=0.1),
    "the normalizer is": lambda value: value.update(normalizer={"type": "NFC"}),
    "pre-tokenizer's type is \"Sequence\"": lambda value: value.update(pre_tokenizer={"type": "Sequence"}),
    "pre-tokenizer's type is null": lambda value: value.update(pre_tokenizer=None),
    "add_prefix_space is true": lambda value: value["pre_tokenizer"].update(add_prefix_space=True),
    "use_regex is false": lambda value: value["pre_tokenizer"].update(use_regex=False),
    "post-processor's type is \"Template": lambda value: value.update(post_processor={"type": "TemplateProcessing"}),
    "lstrip of token": lambda value: value["added_tokens"][0].update(lstrip=True),
    "lacks or does not know 'model'": lambda value: value.pop("model"),
    "not a whole tokenizer file": lambda value: value["model"].update(vocab=[]),
    "lacks or does not know '€'": lambda value: value["model"]["vocab"].update({"€": 999}),
    "vocabulary lacks 1 of the 256 single bytes": lambda value: value["model"]["vocab"].pop("a"),
    "same id": lambda value: value["model"]["vocab"].update(a=3),
    "merge 0": lambda value: value["model"]["merges"].insert(0, ["q", "q"]),
    "no special token <|endoftext|>": lambda value: (
        value.update(added_tokens=[]), value["model"]["vocab"].pop(END_OF_TEXT)
    ),
    "ids go up to 5000, and the model's vocabulary has 280": lambda value: value["added_tokens"].append(
        {"id": 5000, "content": "<x>"}
    ),
}  # fmt: skip


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer) -> Path:
    return interchange.export_llama(made(tokenizer), tokenizer, tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """A copy of the export, to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(folder: Path) -> str:
    """The message of an import that must fail, in one line, and leave nothing."""
    target = folder.parent / "run"
    with pytest.raises(ValueError) as error:
        interchange.import_llama(folder, target)
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, "output"}
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("message", TOKENIZER_CHANGES)
def test_a_tokenizer_that_ours_cannot_be_is_named(copy, message):
    file = copy / "tokenizer.json"
    value = json.loads(file.read_text())
    TOKENIZER_CHANGES[message](value)
    file.write_text(json.dumps(value))
    text = refused(copy)
    assert message in text and "tokenizer.json" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "'model_type' is \"gemma\"; only 'llama' can be imported"),
        ({"num_key_value_heads": 2}, "'num_key_value_heads' is 2, which is not supported: our model has a key head"),
        ({"attention_bias": True}, "'attention_bias' is true, which is not supported: our projections have no biases"),
        ({"mlp_bias": True}, "'mlp_bias' is true"),
        ({"hidden_act": "gelu"}, "'hidden_act' is \"gelu\""),
        ({"rms_norm_eps": 1e-6}, "'rms_norm_eps' is 1e-06, which is not supported: our RMSNorm has 1e-05"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is 1e-06"),
        ({"head_dim": 24}, "'head_dim' is 24, which is not supported: our heads have"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "RoPE of type \"llama3\" in 'rope_parameters'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type \"linear\" in 'rope_scaling'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
        ({"rope_parameters": [1]}, "'rope_parameters' must be an object, got [1]"),
        ({"rope_parameters": None, "rope_theta": "big"}, "'rope_theta' must be a positive number, got \"big\""),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is {\"bits\": 4}"),
        ({"hidden_size": None}, "it has no 'hidden_size'"),
        ({"hidden_size": "48"}, "'hidden_size' must be int, got \"48\""),
        ({"hidden_size": 50}, "d_model 50 is not a multiple"),
        ({"hidden_size": 56}, "'head_dim' is 12"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "config.json: model.num_heads is 0"),
        ({"num_hidden_layers": 10**12}, "no file has the tensor model.layers.3."),
        ({"num_hidden_layers": 2}, "the tensor model.layers.2."),
        ({"vocab_size": 10**12}, "weight is (280, 48), and (1000000000000, 48) by config.json"),
        ({"vocab_size": 279}, "ids go up to 279, and the model's vocabulary has 279"),
        ({"intermediate_size": 96}, "mlp.down_proj.weight is (48, 80), and (48, 96) by config.json"),
        ({"max_position_embeddings": 10**12}, "'max_position_embeddings' is 1000000000000, which is not supported"),
        ({"max_position_embeddings": 0}, "context_length is 0"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be bool, got 1"),
        ({"eos_token_id": 7}, "'eos_token_id' is 7, and <|endoftext|>, with which our texts end, is 256"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_our_model_cannot_be_is_named(copy, change, message):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in refused(copy)


def test_weights_that_do_not_fit_are_named(copy):
    file = copy / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"

    def message(**change):
        save_file({key: value for key, value in (whole | change).items() if value is not None}, file)
        return refused(copy)

    assert f"no file has the tensor {name}" in message(**{name: None})
    assert f"{name} is (24, 48), and (48, 48)" in message(**{name: whole[name][:24].clone()})
    assert f"{name} is I64, which is not supported: F32, F16, BF16" in message(**{name: whole[name].long()})
    assert "the tensor extra.bias has no place in our model" in message(**{"extra.bias": torch.ones(2)})
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "model.safetensors is not a whole safetensors file" in refused(copy)
    file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert "its pytorch_model.bin is a pickle, which is not read" in refused(copy)


def test_what_older_files_hold_twice_is_left_out(copy, tokenizer):
    file = copy / "model.safetensors"
    older = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(older, file)
    run = interchange.import_llama(copy, copy.parent / "run")
    loaded, _ = checkpoint.load_model(run / "checkpoints" / "step-00000000")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), made(tokenizer)(ids))


@pytest.mark.parametrize("bad", ["../copy/model.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_reads_no_file_of_another_folder(copy, bad):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": bad}}))
    assert "is not a file of this folder" in (text := refused(copy)) or "no 'weight_map'" in text


def test_files_that_are_missing_or_no_json_are_named(copy, tmp_path):
    with pytest.raises(ValueError, match="no folder at"):
        interchange.import_llama(tmp_path / "none", tmp_path / "run")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone"}}))
    assert "gone is not a whole safetensors file" in refused(copy)
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        before = (copy / name).read_text()
        (copy / name).write_text(before[: len(before) // 2])
        assert f"{name}: not a JSON file" in refused(copy)
        (copy / name).unlink()
        if name != "model.safetensors.index.json":
            assert name in refused(copy)
        (copy / name).write_text(before)


def test_nothing_is_unpickled(exported, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(place, refuse)
    interchange.import_llama(exported, tmp_path / "run")


# --- Folders and commands -------------------------------------------------------------------------


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, tokenizer, exported):
    model = made(tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for place in ("full", "file"):
        with pytest.raises(ValueError, match=f"{place} exists and is not an empty folder"):
            interchange.export_llama(model, tokenizer, tmp_path / place)
    with pytest.raises(ValueError, match="280 tokens are more than the model's 279"):
        interchange.export_llama(made(tokenizer, vocab_size=279), tokenizer, tmp_path / "small")
    with pytest.raises(OSError, match="file"):
        interchange.export_llama(model, tokenizer, tmp_path / "file" / "inside")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            interchange.export_llama(model, tokenizer, tmp_path / "disk")
        with pytest.raises(OSError):
            interchange.import_llama(exported, tmp_path / "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    written = interchange.export_llama(model, tokenizer, tmp_path / "empty")
    with safe_open(written / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (written / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_commands_from_a_run_to_hugging_face_and_back(tmp_path, tokenizer, exported, capsys):
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    assert main(["import-hf", "--input", str(exported), "--output", str(run)]) == 0
    assert main(["export", "--checkpoint", str(run), "--output", str(out)]) == 0
    assert main(["import-hf", "--input", str(out), "--output", str(again)]) == 0
    assert capsys.readouterr().out.count("written: ") == 3
    assert (out / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()

    command = [
        "generate",
        "--prompt",
        "the cat",
        "--prompt",
        "é",
        "--max_new_tokens",
        "60",
        "--seed",
        "4",
        "--checkpoint",
    ]
    written = []
    for arguments in ([*command, str(run)], [*command, str(again), "--no_cache"]):
        assert main(arguments) == 0
        result = capsys.readouterr()
        written.append(result.out)
        assert result.err.startswith("prefill: ") and "decode: " in result.err and "tokens/s" in result.err
    assert written[0] == written[1]
    one, two = written[0].split("\n\né")
    assert one.startswith("the cat") and len(one) > 20 and len(two) > 20 and two.endswith("\n\n")

    assert main(["import-hf", "--input", str(out), "--output", str(run)]) == 2
    assert main(["export", "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "is not an empty folder" in errors[0] and "no checkpoint" in errors[1]


def test_generate_streams(tmp_path, tokenizer):
    """The text comes while it is written: its first pieces can be read from a process that would write for minutes."""
    model = made(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.token_id(END_OF_TEXT)] = 0  # of 280 logits, this 0 is never the largest: no end
    out = interchange.export_llama(model, tokenizer, tmp_path / "out")
    run = interchange.import_llama(out, tmp_path / "run")
    arguments = [
        *("generate", "--checkpoint", str(run), "--prompt", "the", "--max_new_tokens", "1000000"),
        *("--temperature", "0"),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "lmsys", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            start = process.stdout.read(40)
            assert start.startswith(b"the") and process.poll() is None
        finally:
            process.kill()
