"""Data: stories and other corpora, the tokenizer, token files and batches."""

from lmsys.data.corpora import (
    BatchSampler,
    Corpus,
    RandomTokenDataset,
    TextFileDataset,
    check_text,
    choose_mode,
    find_input,
    input_file,
    load_tokens,
    prepare_corpus,
    sequential_batches,
    shard,
    tokenize_to_npy,
)

__all__ = [
    "BatchSampler",
    "Corpus",
    "RandomTokenDataset",
    "TextFileDataset",
    "check_text",
    "choose_mode",
    "find_input",
    "input_file",
    "load_tokens",
    "prepare_corpus",
    "sequential_batches",
    "shard",
    "tokenize_to_npy",
]
