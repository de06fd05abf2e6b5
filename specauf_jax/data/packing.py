"""Documents of tokens, packed into rows of fixed length and taken out again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

OPEN_ROWS = 64
"""Rows that wait for a document that fits; more waste less padding and reach further back in the order."""


@dataclass
class Document:
    """One conversation or text: tokens int32 [n], loss_mask bool [n] (True where the token is supervised)."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def pack(documents: Iterable[Document], length: int) -> Iterator[dict]:
    """Rows of S = `length` tokens: `tokens` int32 [S], `loss_mask` bool [S], `document_ids` int32 [S].

    First fit over a few open rows: deterministic, each document whole and in one row. Ids count
    1, 2, ... within a row; padding has id 0, token 0 and mask False.

    Raises:
      ValueError: a document is empty or longer than a row.
    """
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in documents:
        size = len(document.tokens)
        if not 1 <= size <= length:
            raise ValueError(f"a document of {size} tokens does not fit a row of 1 to {length}")
        index = next((i for i, space in enumerate(free) if size <= space), None)
        if index is None:
            if len(rows) == OPEN_ROWS:
                yield _close(rows, free, int(np.argmin(free)), length)
            index = len(rows)
            rows.append([])
            free.append(length)
        rows[index].append(document)
        free[index] -= size
        if free[index] == 0:
            yield _close(rows, free, index, length)
    while rows:
        yield _close(rows, free, 0, length)


def _close(rows: list[list[Document]], free: list[int], index: int, length: int) -> dict:
    free.pop(index)
    row = {"tokens": np.zeros(length, np.int32), "loss_mask": np.zeros(length, bool),
           "document_ids": np.zeros(length, np.int32)}  # fmt: skip
    start = 0
    for number, document in enumerate(rows.pop(index), 1):
        span = slice(start, start + len(document.tokens))
        row["tokens"][span] = document.tokens
        row["loss_mask"][span] = document.loss_mask
        row["document_ids"][span] = number
        start = span.stop
    return row


def unpack(row: dict) -> list[Document]:
    """The documents of a row of `pack`, in the row's order."""
    ids = row["document_ids"]
    return [
        Document(row["tokens"][ids == number], row["loss_mask"][ids == number])
        for number in range(1, int(ids.max(initial=0)) + 1)
    ]


def document_positions(document_ids: np.ndarray) -> np.ndarray:
    """Position of every token within its own document, int32, same shape [..., S]; 0 at padding."""
    index = np.arange(document_ids.shape[-1])
    starts = np.zeros(document_ids.shape, np.int64)
    starts[..., 1:] = np.where(document_ids[..., 1:] != document_ids[..., :-1], index[1:], 0)
    positions = index - np.maximum.accumulate(starts, axis=-1)
    return np.where(document_ids == 0, 0, positions).astype(np.int32)
