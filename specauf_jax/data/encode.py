"""Records become documents: tokenised, cut to the row, counted."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from specauf_jax.data import chat
from specauf_jax.data.packing import Document
from specauf_jax.data.rows import BadRecord
from specauf_jax.data.sources import BadRecords, Record
from specauf_jax.data.tokenizer import Tokenizer

ENCODE_TOGETHER = 64
"""Records tokenised in one call; the tokenizers library spreads them over the cores."""


@dataclass
class Counts:
    """What went into the dataset."""

    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    conversations: int = 0
    ended: bool = False
    """Whether any answer ends with a token that ends a turn."""
    largest: int = 0
    """Token id."""
    example: Document | None = None

    def add(self, document: Document) -> None:
        """Count a document; the first is kept as the example."""
        self.documents += 1
        self.tokens += len(document.tokens)
        self.supervised += int(document.loss_mask.sum())
        self.largest = max(self.largest, int(document.tokens.max()))
        self.example = self.example or document


def encode(
    tokenizer: Tokenizer, records: Iterable[Record], length: int, bad: BadRecords, counts: Counts
) -> Iterator[Document]:
    """Documents of at most `length` tokens; conversations are cut, texts go on in the next document."""
    records, front = iter(records), chat.front_ids(tokenizer)
    while batch := list(itertools.islice(records, ENCODE_TOGETHER)):
        texts = [record.content for record in batch if isinstance(record.content, str)]
        encoded = iter(chat.encode_texts(tokenizer, texts))
        for record in batch:
            if isinstance(record.content, str):
                documents = _windows(next(encoded), length, front)
            else:
                documents = _conversation(tokenizer, record, length, bad, counts)
            for document in documents:
                counts.add(document)
                yield document


def _windows(document: Document, length: int, front: list[int]) -> list[Document]:
    """Pieces of a text, each as a text of its own begins."""
    room, start = length - len(front), np.array(front, np.int32)
    pieces = [document.tokens[i : i + room] for i in range(0, len(document.tokens), room)]
    tokens = [np.concatenate([start, piece]) for piece in pieces]
    return [Document(piece, np.ones(len(piece), bool)) for piece in tokens]


def _conversation(tokenizer: Tokenizer, record: Record, length: int, bad: BadRecords, counts: Counts) -> list[Document]:
    """Its documents: one, or one for each answer (`chat.conversation_documents`); none when it is unusable."""
    where = record.where
    try:
        documents = chat.conversation_documents(tokenizer, record)
    except chat.RefusedConversation as error:
        bad.add(BadRecord(where, f"{error.found.removeprefix(f'{where}: ')} (to do: {error.remedy})"))
        return []
    # The mask token stands for what is to be predicted; as a label it would teach the drafter to draft it.
    if any(np.any(document.tokens == tokenizer.mask_token_id) for document in documents):
        bad.add(BadRecord(where, f"contains the mask token {tokenizer.mask_token}"))
        return []
    cut = [Document(document.tokens[:length], document.loss_mask[:length]) for document in documents]
    if not any(len(document.tokens) for document in documents):
        bad.add(BadRecord(where, "the chat template renders it as nothing"))
        return []
    # A long conversation's later answers may lie behind the cut; its first ones still count.
    supervised = [document for document in cut if document.loss_mask.any()]
    if any(document.loss_mask.any() for document in documents) and not supervised:
        bad.add(BadRecord(where, f"no supervised token within the first {length} tokens"))
        return []
    counts.truncated += sum(len(document.tokens) > length for document in documents)
    counts.conversations += 1
    counts.ended |= any(np.isin(document.tokens[document.loss_mask], tokenizer.stops).any() for document in documents)
    return supervised or cut
