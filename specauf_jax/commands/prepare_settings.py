"""Settings of `specauf prepare`."""

from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import at_least, not_negative, positive, template_arguments, unused
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Prepare:
    """Turn conversations or text into a tokenised, packed TFDS dataset with loss masks.

    Give exactly one source: --input, --tfds or --corpus.
    """

    out: str
    """Folder to write: dataset/, tokenizer/, manifest.json and, for --corpus, prompts/NAME.jsonl."""
    input: tuple[str, ...] = ()
    """JSONL or Parquet of conversations (`conversations` or `messages`), text files, folders of these, or pipes; all
    but Parquet may be compressed by gzip."""
    tfds: str | None = None
    """Name of a TFDS dataset, such as 'my_dataset/config:1.0.0'."""
    tfds_split: str = "train"
    tfds_dir: str | None = None
    """TFDS data directory; None takes the library's default."""
    tfds_prompt_field: str | None = None
    """Field that holds the user's message; with --tfds-response-field."""
    tfds_response_field: str | None = None
    tfds_text_field: str | None = None
    """Field that holds plain text, instead of prompt and response."""
    corpus: Literal["stdlib"] | None = None
    """The running interpreter's own standard-library sources, with held-out domains."""
    corpus_bytes: int = 8_000_000
    """Most bytes of the embedded corpus to use."""
    tokenizer: str | None = None
    """Folder with a Hugging Face tokenizer.json; None trains a byte-level BPE on the source."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; stored with the data."""
    vocab_size: int = 2048
    """Vocabulary of the BPE that is trained, at least 300: 256 bytes, four markers and a few merges."""
    sequence_length: int = 2048
    """S: tokens per packed row, at least 16."""
    heldout_prompts: int = 48
    """Prompts per held-out domain of the embedded corpus."""
    prompt_length: int = 64
    """Tokens per held-out prompt."""
    max_bad_records: int = 0
    """Unusable records to tolerate; each is named with its file and line."""
    allow_uniform_mask: bool = False
    """Accept a conversation dataset whose loss mask is all 0 or all 1."""

    def __post_init__(self):
        positive(self, "corpus_bytes", "heldout_prompts", "prompt_length")
        not_negative(self, "max_bad_records")
        at_least(self, 16, "sequence_length")
        at_least(self, 300, "vocab_size")
        given = [f"--{name}" for name in ("input", "tfds", "corpus") if getattr(self, name)]
        if len(given) != 1:
            raise SpecaufError(f"{len(given)} sources given ({', '.join(given) or 'none'})", "exactly one",
                               "pass one of --input, --tfds and --corpus")  # fmt: skip
        if not self.tfds:
            unused(self, "tfds_split", "tfds_dir", "tfds_prompt_field", "tfds_response_field", "tfds_text_field",
                   when="without --tfds")  # fmt: skip
        if self.tokenizer is not None:
            unused(self, "vocab_size", when="with --tokenizer")
        if self.corpus is None:
            unused(self, "corpus_bytes", "heldout_prompts", "prompt_length", when="without --corpus")
        else:
            unused(self, "max_bad_records", when="with --corpus, which has no bad records")
        if self.corpus is not None or self.tfds_text_field is not None:
            unused(self, "allow_uniform_mask", "template_args", when="without conversations")
        template_arguments(self.template_args)
        pair = self.tfds_prompt_field, self.tfds_response_field
        if self.tfds and (any(pair) if self.tfds_text_field else not all(pair)):
            raise SpecaufError("the fields of the TFDS dataset are not named, or both ways at once",
                               "a text field, or a prompt field and a response field",
                               "pass --tfds-text-field, or --tfds-prompt-field and --tfds-response-field")  # fmt: skip

    @property
    def tfds_fields(self) -> tuple[str, ...]:
        """Fields of the TFDS dataset to read: (text,) or (prompt, response)."""
        named = self.tfds_text_field, self.tfds_prompt_field, self.tfds_response_field
        return tuple(name for name in named if name)
