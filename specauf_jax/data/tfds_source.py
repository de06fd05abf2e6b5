"""Reader of TFDS datasets: conversations of one turn, or texts, by the names of their fields."""

from collections.abc import Iterator, Sequence

from specauf_jax.data.rows import BadRecord
from specauf_jax.data.sources import Record
from specauf_jax.errors import SpecaufError


def import_tfds() -> None:
    """Import TFDS before a progress bar runs: its import changes Python's own `import`, which no thread may meet."""
    import tensorflow_datasets  # noqa: F401


def read_tfds(name: str, fields: Sequence[str], *, split: str, data_dir: str | None) -> Iterator[Record | BadRecord]:
    """Records of a TFDS dataset.

    Args:
      name: of the dataset, as TFDS takes it.
      fields: names of one field of text, or of the user's message and the response.
      split: of the dataset.
      data_dir: of TFDS; None takes the library's default.

    Raises:
      SpecaufError: the dataset cannot be opened, or lacks a field.
    """
    source = _open_tfds(name, split, data_dir)
    features = set(source.dataset_info.features)
    if not set(fields) <= features:
        raise SpecaufError(f"TFDS dataset {name} has no field {', '.join(sorted(set(fields) - features))}",
                           f"one of {', '.join(sorted(features))}", "change the --tfds-...-field settings")  # fmt: skip
    for index in range(len(source)):
        where = f"{name}[{split}]:{index}"
        try:
            texts = [_as_text(source[index][field]) for field in fields]
        except ValueError as error:
            yield BadRecord(where, str(error))
            continue
        if len(texts) == 1:
            yield Record(where, texts[0])
        else:
            roles = ("user", "assistant")
            yield Record(where, [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])


def _open_tfds(name: str, split: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # a builder may raise anything
        raise SpecaufError(f"TFDS dataset {name!r}, split {split!r} cannot be opened: "
                           f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
                           "a dataset in ArrayRecord format",
                           "check --tfds, --tfds-split and --tfds-dir") from error  # fmt: skip


def _as_text(value) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError(f"the field holds {type(value).__name__}, not text")
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError("the field is empty")
    return text
