"""Data: stories and other corpora, the tokenizer, token files and batches."""

from lmsys.data.corpora import BatchSampler, RandomTokenDataset, TextFileDataset, load_tokens, sequential_batches

__all__ = ["BatchSampler", "RandomTokenDataset", "TextFileDataset", "load_tokens", "sequential_batches"]
