"""Data: formats, splits, rows, order and state; and the errors bad data gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small

from effprof.errors import EffprofError
from effprof.trainer.corpus import DatasetCorpus, FileCorpus, corpus
from effprof.trainer.data import IGNORED, Batches, StreamBatches, make_batch, rows
from effprof.trainer.tokenizer import tokenizer

CPU = torch.device("cpu")
TEXTS = [
    f"document {number} " + "some words to learn from " * (number % 7 + 1) for number in range(120)
]


def files(path: str | Path) -> FileCorpus:
    found = corpus(str(path))
    assert isinstance(found, FileCorpus)
    return found


def everything(path: str | Path) -> list[str]:
    found = files(path)
    return [text for split in ("train", "validation") for text in found.documents(split)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "txt", "md"])
def test_every_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS)
    if suffix == "jsonl":
        path.write_text(lines)
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.table({"text": TEXTS, "other": [1] * len(TEXTS)}), path)
    else:
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.{suffix}").write_text(text)
        path = tmp_path
    assert sorted(everything(path)) == sorted(TEXTS)
    assert len(list(files(path).documents("validation"))) >= 1


def test_a_long_file_is_several_documents(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(40_000))
    (tmp_path / "long.txt").write_text(text)
    found = everything(tmp_path / "long.txt")
    assert len(found) > 3
    assert sum(map(len, found)) == len(text)
    assert all(piece.endswith("\n") for piece in found)


def test_splits_are_disjoint_and_independent_of_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "a" / f"{number:03}.txt").write_text(text)
        (tmp_path / "b" / f"{999 - number}.txt").write_text(text)
    first, second = (set(files(tmp_path / name).documents("validation")) for name in "ab")
    assert first == second
    assert not first & set(files(tmp_path / "a").documents("train"))


def test_default_corpus_is_the_standard_library() -> None:
    found = corpus(None)
    assert isinstance(found, FileCorpus)
    assert any(path.name == "argparse.py" for path in found.files)
    assert not any("site-packages" in path.parts for path in found.files)


BAD = [
    ("empty.txt", b"", "0 document"),
    ("one.txt", b"just one document", "1 document"),
    ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "Line 2"),
    ("none.jsonl", b'{"body": "x"}\n', "'text'"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 500)[:-20], "Cannot read"),
    ("no.parquet", b"this is not parquet", "Cannot read"),
    ("noise.txt", bytes(range(128, 256)) * 40, "not UTF-8"),
    ("odd.bin", b"x", "unknown format"),
]


@pytest.mark.parametrize(("name", "content", "fragment"), BAD, ids=[row[0] for row in BAD])
def test_bad_files(name: str, content: bytes, fragment: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EffprofError) as error:
        everything(tmp_path / name)
    assert fragment in error.value.message
    assert error.value.hint


def test_empty_folder_and_missing_path(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "*.jsonl"):
        with pytest.raises(EffprofError):
            corpus(str(path))


def prepared(folder: Path, tiny: str, **changes: Any) -> tuple[Any, Any, Any]:
    found = files(folder)
    plan = small(tiny, "full", **changes)
    words = tokenizer(found, plan.architecture.vocab, None)
    return plan, words, rows(found, words, plan, "train")


def test_packed_rows_are_the_documents_end_to_end(texts: Path, tiny: str) -> None:
    plan, words, table = prepared(texts, tiny)
    flat = np.concatenate([table.ids[index] for index in range(len(table))])
    expected: list[int] = []
    for text in files(texts).documents("train"):
        expected += [*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
    assert flat.tolist() == expected[: len(flat)]
    assert len(expected) - len(flat) < plan.seq_len


def test_padded_rows_hold_one_document_each(texts: Path, tiny: str) -> None:
    _, words, table = prepared(texts, tiny, rows="padded", seq_len=64)
    batch = table.batch(np.arange(4), CPU)
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        real = labels != IGNORED
        length = int(real.sum())
        assert torch.equal(ids[:length], labels[:length])
        assert ids[length - 1] == words.eos_token_id
        assert not real[length:].any()
    assert batch.real_tokens == int((batch.labels != IGNORED).sum())
    assert batch.targets == int((batch.labels[:, 1:] != IGNORED).sum())


def test_isolated_rows_restart_positions_and_hide_first_tokens(tiny: str) -> None:
    plan = small(tiny, "full", rows="packed-isolated", seq_len=8)
    end = 9
    batch = make_batch(np.array([[5, 6, end, 7, 8, end, 1, 2]]), None, plan, end, CPU)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[IGNORED, 6, end, IGNORED, 8, end, IGNORED, 2]]
    assert batch.targets == 5


def test_isolated_documents_do_not_see_each_other(tiny: str) -> None:
    """The loss on a document is the same whatever stands before it in the row."""
    from effprof.trainer.build import build
    from effprof.trainer.step import forward

    plan = small(tiny, "full", rows="packed-isolated", seq_len=8)
    model, _ = build(plan)
    end = 9
    one = np.array([[5, 6, 11, end, 7, 8, 3, 4]])
    two = np.array([[15, 26, 31, end, 7, 8, 3, 4]])
    logits = [
        forward(model, make_batch(ids, None, plan, end, CPU), plan).logits for ids in (one, two)
    ]
    torch.testing.assert_close(logits[0][0, 4:], logits[1][0, 4:])
    assert not torch.allclose(logits[0][0, :4], logits[1][0, :4])


def test_an_epoch_sees_every_row_once(texts: Path, tiny: str) -> None:
    plan, _, table = prepared(texts, tiny)
    batches = Batches(table, plan, 0, CPU)
    per_epoch = len(table) // plan.micro_batch
    seen = torch.cat([batches.next().ids for _ in range(per_epoch)])
    assert len(seen.unique(dim=0)) == len({tuple(row) for row in seen.tolist()}) == len(seen)
    assert batches.epoch == 0
    again = torch.cat([batches.next().ids for _ in range(per_epoch)])
    assert batches.epoch == 1
    assert not torch.equal(seen, again)


def test_order_depends_on_the_seed_and_state_restores_it(texts: Path, tiny: str) -> None:
    plan, _, table = prepared(texts, tiny)
    one, two = (Batches(table, plan, seed, CPU) for seed in (0, 1))
    assert not torch.equal(one.next().ids, two.next().ids)
    state = one.state_dict()
    expected = [one.next().ids for _ in range(3)]
    other = Batches(table, plan, 0, CPU)
    other.load_state_dict(state)
    assert all(torch.equal(a, other.next().ids) for a in expected)


def test_a_sequence_beyond_the_data(tmp_path: Path, tiny: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"tiny text {number}")
    with pytest.raises(EffprofError, match="less than one row"):
        prepared(tmp_path, tiny, seq_len=256)


def test_streams_resume_where_they_were(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (path, config, streaming) == ("owner/set", "en", True)
        whole = datasets.Dataset.from_dict({"text": TEXTS})
        return whole.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = corpus("owner/set:en")
    assert isinstance(found, DatasetCorpus)
    for mode in ("packed", "padded"):
        plan = small(tiny, "full", rows=mode)
        words = tokenizer(found, 1024, None)
        stream = StreamBatches(found, words, plan, "train", CPU)
        for _ in range(5):
            stream.next()
        state = json.loads(json.dumps(stream.state_dict()))
        expected = [stream.next().ids for _ in range(4)]
        other = StreamBatches(found, words, plan, "train", CPU)
        other.load_state_dict(state)
        assert all(torch.equal(a, other.next().ids) for a in expected), mode
        for _ in range(80):  # beyond the end: another epoch
            assert other.next().ids.shape == (2, 32)


def test_a_dataset_that_cannot_be_loaded() -> None:
    with pytest.raises(EffprofError, match="Cannot load the dataset"):
        DatasetCorpus("nobody/nothing").stream("train")


def test_tokenizers_are_checked(texts: Path, tiny: str, tmp_path: Path) -> None:
    found = files(texts)
    made = tokenizer(found, 1024, None)
    made.save_pretrained(tmp_path / "tok")
    assert len(tokenizer(found, 1024, str(tmp_path / "tok"))) == len(made)
    with pytest.raises(EffprofError, match="only 100"):
        tokenizer(found, 100, str(tmp_path / "tok"))
    with pytest.raises(EffprofError, match="Cannot load"):
        tokenizer(found, 1024, str(tmp_path / "missing.json"))
