import numpy as np
import pytest

from specauf_jax.data.packing import Document, document_positions, pack, unpack


def make_documents(lengths):
    """Documents whose tokens name their document, with a loss mask on every other token."""
    return [
        Document(np.arange(n, dtype=np.int32) + 100 * i + 1, np.arange(n) % 2 == i % 2) for i, n in enumerate(lengths)
    ]


def as_set(documents):
    return {(tuple(d.tokens.tolist()), tuple(d.loss_mask.tolist())) for d in documents}


def test_pack_by_hand():
    rows = list(pack(make_documents([5, 6, 3]), 8))
    # 6 does not fit beside 5; 3 does, and fills the first row, which is therefore the first out.
    assert rows[0]["tokens"].tolist() == [1, 2, 3, 4, 5, 201, 202, 203]
    assert rows[0]["document_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert rows[0]["loss_mask"].tolist() == [1, 0, 1, 0, 1, 1, 0, 1]
    assert rows[1]["tokens"].tolist() == [101, 102, 103, 104, 105, 106, 0, 0]
    assert rows[1]["document_ids"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert rows[1]["loss_mask"].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]


def test_unpack_is_the_inverse_and_little_is_padding():
    documents = make_documents(np.random.default_rng(0).integers(1, 33, 700))
    rows = list(pack(documents, 32))
    assert as_set(d for row in rows for d in unpack(row)) == as_set(documents)
    assert sum(len(unpack(row)) for row in rows) == len(documents)
    assert np.mean([row["document_ids"] > 0 for row in rows]) > 0.9
    assert all(row["tokens"].dtype == row["document_ids"].dtype == np.int32 for row in rows)


def test_pack_is_a_stream():
    def endless():
        while True:
            yield from make_documents([20])

    rows = pack(endless(), 32)
    assert [len(unpack(next(rows))) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("length", [0, 9])
def test_pack_refuses_what_does_not_fit(length):
    with pytest.raises(ValueError, match=f"{length} tokens"):
        list(pack(make_documents([length]), 8))


def test_document_positions():
    ids = np.array([[1, 1, 1, 2, 0, 0], [1, 2, 3, 3, 3, 3]], np.int32)
    positions = document_positions(ids)
    assert positions.tolist() == [[0, 1, 2, 0, 0, 0], [0, 0, 0, 1, 2, 3]]
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(document_positions(ids[0]), positions[0])
