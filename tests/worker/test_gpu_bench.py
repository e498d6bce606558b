"""`benches.gpu` runs, here on the CPU with a tiny model."""

import pytest

from benches import gpu


def test_bench_prints_a_row_of_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert len({len(row) for row in rows}) == 1
    header, _, *cells = rows
    assert header[1] == "step"
    assert [row[1] for row in cells] == [
        "decode, batch 1, context 48",
        "decode, batch 1, context 48, planned ahead",
        "decode, batch 2, context 48",
        "decode, batch 2, context 48, planned ahead",
        "prefill of 32 tokens",
    ]
    for row in cells:
        # So many tokens in so many milliseconds. No bound on the share: on a busy machine the limit was busy too.
        tokens = 32 if "prefill" in row[1] else int(row[1].split(",")[1].split()[1])
        assert float(row[3]) == pytest.approx(tokens / float(row[2]) * 1e3, rel=0.2)
        assert float(row[6]) >= 0
        assert row[5] in {"memory", "products"}


def test_weights_are_counted_once() -> None:
    shape = gpu.SHAPES["tiny"]
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176
    assert shape.layer_weights == 2 * matrices
    assert shape.kv_numbers == 2 * 2 * 2 * 16
    card = gpu.Card(bytes_per_s=100.0, flops_per_s=1000.0)
    assert card.limit(200, 1000) == (2.0, "memory")
    assert card.limit(200, 9000) == (9.0, "products")
