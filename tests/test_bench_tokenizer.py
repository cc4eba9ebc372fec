import pytest

from lmsys.bench import experiment
from lmsys.bench import tokenizer as bench
from lmsys.config import END_OF_TEXT


def parameters(**given):
    return bench.NOTEBOOK.parameters({"scale": "smoke"} | given)


def test_benchmark(tmp_path):
    text = bench.write_text(tmp_path / "text.txt", 0.2)
    p = parameters(text=str(text), vocab_size=400, encode_mb=0.05)
    rows = experiment.run(bench.BENCHMARK, p, folder=tmp_path)
    assert list(rows.status) == ["ok"] * 8, rows
    assert rows[rows.task == "encode"].tokens.nunique() == 1
    assert set(rows[rows.task == "encode"].implementation) == set(bench._ENCODERS)
    assert (rows.seconds > 0).all() and (rows.mb_per_s > 0).all() and (rows.vocab_size == 400).all()


def test_benchmark_of_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no text file at .*none.txt"):
        parameters(text=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="at least 257"):
        parameters(vocab_size=256)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    rows = experiment.run(bench.BENCHMARK, parameters(text=str(tmp_path / "bad.txt")), folder=tmp_path)
    assert (rows[rows.task == "encode"].status == "unsupported").all()
    assert rows.note.str.contains("offset 3").any()


def test_benchmark_text(tmp_path):
    path = bench.write_text(tmp_path / "t", 0.2)
    assert 0.2e6 <= path.stat().st_size < 0.25e6
    assert path.read_text(encoding="utf-8").count(END_OF_TEXT) > 20
