"""Odd tables: absurd, missing and empty cells drop their rows with a reason, and nothing loops."""

from __future__ import annotations

import warnings

import pytest

from pardemo import predict
from pardemo.predict.tables import read

SHAPE = {"layers": "16", "hidden": "2048", "heads": "32", "ffn": "8192", "vocab": "131072"}
ROW = SHAPE | {
    "seq": "4096", "nodes": "1", "gpus_per_node": "8", "mbs": "1", "grad_acc": "16", "dp": "8",
    "pp": "1", "tp": "1", "zero": "1", "step_s": "3.3", "mem_gb": "24", "status": "ok",
}  # fmt: skip


def _table(tmp_path, **odd):
    """Three rows that differ in their microbatch, and one with odd cells."""
    rows = [ROW | {"mbs": str(k), "step_s": str(3.3 * k)} for k in (1, 2, 4)] + [ROW | odd]
    lines = [",".join(row.values()) for row in rows]
    path = tmp_path / "odd.csv"
    path.write_text("\n".join([",".join(ROW), *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("odd", "reason"),
    [({"layers": "1e20"}, "beyond any model"), ({"pp": "1e20"}, "beyond any model"),
     ({"vocab": "1e18"}, "beyond any model"), ({"heads": "0"}, "below 1"),
     ({"nodes": "0"}, "below 1"), ({"gpus_per_node": "-8"}, "below 1"), ({"seq": "nan"}, "missing"),
     ({"zero": "9"}, "zero is"), ({"step_s": "1e-300"}, "nanosecond"),
     ({"mem_gb": "0"}, "memory below")],
)  # fmt: skip
def test_an_odd_row_is_dropped_with_its_reason_and_the_others_stay(tmp_path, odd, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = predict.score(_table(tmp_path, **odd), 0).stats
    assert [n for why, n in stats["skipped"].items() if reason in why] == [1]
    assert stats["rows"] == 3


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_cannot_be_one_is_refused_in_words(tmp_path, seed):
    with pytest.raises(predict.TableError, match="--seed must be at least 0"):
        predict.score(_table(tmp_path), 0, seed)


@pytest.mark.parametrize("written", [str.upper, str.title])
def test_columns_may_be_written_in_capitals(tmp_path, written):
    path = _table(tmp_path)
    told = read(path)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([written(header), *lines]) + "\n")
    again = read(path)
    assert (again.kind, again.cells) == ("layouts", told.cells)
    assert predict.score(path, 0).stats["rows"] == 4


def test_capitals_tell_bits_from_bytes_in_a_rate(tmp_path):
    path = tmp_path / "rates.csv"
    path.write_text("COLLECTIVE,RANKS,NODES,SIZE_BYTES,BUSBW_GBPS\nall_reduce,8,1,1,3\n")
    assert read(path).has("busbw_GBps")
    path.write_text("collective,ranks,nodes,size_bytes,busbw_Gbps\nall_reduce,8,1,1,3\n")
    with pytest.raises(predict.TableError, match="busbw_GBps"):
        read(path)
