"""Reader of TFDS datasets: conversations of one turn, or texts, by the names of their fields."""

from collections.abc import Iterator

from specauf_jax.config import Prepare
from specauf_jax.data.sources import BadRecord, Record
from specauf_jax.errors import SpecaufError


def read_tfds(config: Prepare) -> Iterator[Record | BadRecord]:
    """Records of a TFDS dataset, by the fields that the configuration names.

    Raises:
      SpecaufError: the dataset cannot be opened, or lacks a field.
    """
    fields = tfds_fields(config)
    source = _open_tfds(config)
    features = set(source.dataset_info.features)
    if not set(fields) <= features:
        raise SpecaufError(f"TFDS dataset {config.tfds} has no field {', '.join(sorted(set(fields) - features))}",
                           f"one of {', '.join(sorted(features))}", "change the --tfds-...-field settings")  # fmt: skip
    for index in range(len(source)):
        where = f"{config.tfds}[{config.tfds_split}]:{index}"
        try:
            texts = [_as_text(source[index][field]) for field in fields]
        except ValueError as error:
            yield BadRecord(where, str(error))
            continue
        if len(texts) == 1:
            yield Record(where, text=texts[0])
        else:
            roles = ("user", "assistant")
            yield Record(where, messages=[{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])


def tfds_fields(config: Prepare) -> tuple[str, ...]:
    """(text,) or (prompt, response): names of the fields to read.

    Raises:
      SpecaufError: neither or both are named.
    """
    pair = (config.tfds_prompt_field, config.tfds_response_field)
    if config.tfds_text_field and not any(pair):
        return (config.tfds_text_field,)
    if all(pair) and not config.tfds_text_field:
        return pair
    raise SpecaufError("the fields of the TFDS dataset are not named, or both ways at once",
                       "a text field, or a prompt field and a response field",
                       "pass --tfds-text-field, or --tfds-prompt-field and --tfds-response-field")  # fmt: skip


def _open_tfds(config: Prepare):
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(config.tfds, split=config.tfds_split, data_dir=config.tfds_dir)
    except Exception as error:  # a builder may raise anything
        raise SpecaufError(f"TFDS dataset {config.tfds!r}, split {config.tfds_split!r} cannot be opened: "
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
