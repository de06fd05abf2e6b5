"""What `specauf prepare` shows: one document with its loss mask, and a summary."""

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specauf_jax.data.packing import Document
from specauf_jax.data.tokenizer import Tokenizer

SHOWN_TOKENS = 256


def print_example(console: Console, tokenizer: Tokenizer, document: Document) -> None:
    """Print the start of a document: supervised tokens in green, the others dim."""
    shown = Text()
    pairs = zip(document.tokens[:SHOWN_TOKENS].tolist(), document.loss_mask[:SHOWN_TOKENS].tolist(), strict=True)
    # Runs, not tokens, are decoded: one character may be spread over several tokens.
    for supervised, run in groupby(pairs, key=lambda pair: pair[1]):
        shown.append(tokenizer.decode([token for token, _ in run]), style="green" if supervised else "dim")
    if len(document.tokens) > SHOWN_TOKENS:
        shown.append(" …", style="dim")
    console.rule("one document: supervised tokens in green, others dim", style="dim")
    console.print(shown)
    console.rule(style="dim")


def print_summary(console: Console, out: str, manifest: dict, *, plain_text: bool) -> None:
    """Print the manifest's counts as a table."""
    table = Table(title=f"written to {out}", show_header=False, title_justify="left")
    share = f"{manifest['supervised_share']:.1%}" + (" (plain text: every token by its nature)" if plain_text else "")
    fill = manifest["tokens"] / (manifest["rows"] * manifest["sequence_length"])
    table.add_row("source", manifest["source"])
    table.add_row("rows", f"{manifest['rows']:,} of {manifest['sequence_length']:,} tokens, {fill:.1%} filled")
    table.add_row("documents", f"{manifest['documents']:,}, {manifest['truncated_documents']:,} of them truncated")
    table.add_row("tokens", f"{manifest['tokens']:,}")
    table.add_row("supervised", share)
    table.add_row("bad records", f"{manifest['bad_records']:,}")
    table.add_row("vocabulary", f"{manifest['vocab_size']:,}, mask token {manifest['mask_token_id']}")
    if manifest["prompts"]:
        table.add_row("held-out prompts", ", ".join(manifest["prompts"]))
    console.print(table)
