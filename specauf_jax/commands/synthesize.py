"""`specauf synthesize`: conversations that the target writes by itself, as a dataset (Magpie, arXiv 2406.08464)."""

import collections
import json

import numpy as np
from rich.console import Console

from specauf_jax.checks import template_arguments
from specauf_jax.commands.dialogues import Talk, hold, parts_folder, write_documents
from specauf_jax.commands.loading import check_requests, check_rows, load_decoding, warn
from specauf_jax.commands.record import announce
from specauf_jax.commands.synthesize_settings import Synthesize
from specauf_jax.config import Sampling
from specauf_jax.data.chat import clock_notes, conversation_text, user_opening
from specauf_jax.data.dataset import write_manifest
from specauf_jax.data.preview import print_example, print_summary
from specauf_jax.data.tokenizer import (
    Tokenizer,
    copy_tokenizer,
    described,
    hashes,
    load_tokenizer,
    with_template_args,
)
from specauf_jax.decoding.generate import Dialogue
from specauf_jax.decoding.rows import Request
from specauf_jax.distributed import from_primary, is_primary
from specauf_jax.environment import float32_precision
from specauf_jax.errors import CannotGoOn, SpecaufError
from specauf_jax.files import check_absent, fresh_folder, write_text
from specauf_jax.models.weights import target_config, weights_digest
from specauf_jax.sharding import make_mesh

_FEWEST_KEPT = 0.05  # of a wave
HELDOUT = "synthesized"


def synthesize(config: Synthesize, console: Console) -> dict:
    """Write `config.out`; returns its manifest. A killed run goes on where it stopped.

    Several processes decode the same rows together; the first one writes, the others return {}.
    """
    check_absent(config.out)
    target = target_config(config.target)
    if config.sequence_length > target.context_length:
        raise SpecaufError(
            f"sequence_length {config.sequence_length}",
            f"at most the target's {target.context_length} positions",
            "lower --sequence-length",
        )
    tokenizer = with_template_args(load_tokenizer(config.target), template_arguments(config.template_args))
    opening = _ids(tokenizer, user_opening(tokenizer, []))
    if len(opening) >= config.sequence_length or not opening:
        raise SpecaufError(
            f"the chat template puts {len(opening)} tokens before a user's turn",
            f"some, and fewer than the {config.sequence_length} of a row",
            "change --sequence-length, or take a target whose template marks the user's turns",
        )
    check_requests([opening], target, 0)
    for note in clock_notes(tokenizer):
        warn(console, note)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, mesh)
    announce(config.out, mesh, console)
    params, decoding = load_decoding(config.target, None, config.dtype, mesh, console, tokenizer.stops)
    inputs = {"target": weights_digest(config.target), "tokenizer": hashes(config.target)[0]}
    with parts_folder(config, "synthesis", **inputs) as parts, float32_precision(config.dtype):
        options = {"config": decoding, "seed": config.seed, "batch_size": config.batch_size, "mesh": mesh}
        talks: dict[int, Talk] = {}
        count = more = 0
        while more := int(from_primary(np.asarray(_wanted(config, talks, more, console)))):
            dialogues = {n: _written(tokenizer, n, config) for n in range(count, count + more)}
            talks |= hold(dialogues, parts, params, "writing conversations", console, **options)
            count += more
        if not is_primary():
            return {}
        return _assemble(config, tokenizer, talks, console)


def _wanted(config: Synthesize, talks: dict[int, Talk], last: int, console: Console) -> int:
    """How many conversations more to begin; 0 if enough are kept. Asked on the first process only."""
    if not is_primary():
        return 0
    kept, enough = len(_kept(talks)), config.conversations + config.heldout_prompts
    if kept >= enough:
        return 0
    if talks:
        new = kept - len(_kept({n: talk for n, talk in talks.items() if n < len(talks) - last}))
        console.print(f"{kept} of {enough} conversations kept, of {len(talks)} begun ({_said(talks)})", highlight=False)
        if new < _FEWEST_KEPT * last:
            raise CannotGoOn(
                f"of the last {last} conversations only {new} could be used: {_said(talks)}",
                f"at least {_FEWEST_KEPT:.0%} of them",
                "ask for fewer --conversations, raise --user-temperature or --max-user-tokens, or take a chat model",
            )
    return -(-(enough - kept) * max(len(talks), 1) * 21 // (20 * max(kept, 1)))


def _kept(talks: dict[int, Talk]) -> dict[int, Talk]:
    """Those that can be used, the first of those whose first questions are the same but for case and spaces."""
    kept: dict[str, tuple[int, Talk]] = {}
    for number, talk in sorted(talks.items()):
        if talk.dropped is None:
            kept.setdefault(" ".join(talk.messages[0]["content"].casefold().split()), (number, talk))
    return dict(kept.values())


def _said(talks: dict[int, Talk]) -> str:
    """What share was dropped, and why."""
    reasons = collections.Counter(talk.dropped for talk in talks.values() if talk.dropped is not None)
    reasons["asked before"] = len(talks) - sum(reasons.values()) - len(_kept(talks))
    return "dropped: " + (", ".join(f"{n / len(talks):.1%} {reason}" for reason, n in reasons.items() if n) or "none")


def _written(tokenizer: Tokenizer, number: int, config: Synthesize) -> Dialogue[Talk]:
    """A conversation in which the target is user and assistant. Its answers keep the tokens that were drawn."""
    talk, said = Talk([]), ""  # said: the text of talk.tokens
    user = Sampling(config.user_temperature, top_p=config.user_top_p)

    def extended(text: str, room: int) -> list[int] | None:
        """The tokens so far and those that lead to `text`; None where it is another text, or too long."""
        new = [*talk.tokens, *_ids(tokenizer, text[len(said) :])]
        return new if text.startswith(said) and len(new) + room <= config.sequence_length else None

    for turn in range(config.turns):
        asked = extended(user_opening(tokenizer, talk.messages), 1)
        if asked is None:
            return talk
        room = min(config.max_user_tokens, config.sequence_length - len(asked))
        question = (yield Request(asked, number, room, user)).tokens
        words = tokenizer.decode(question[:-1], skip_special_tokens=False).strip()
        dropped = _unusable(tokenizer, question, words)
        message = {"role": "user", "content": words}
        prompt = None if dropped else extended(conversation_text(tokenizer, [*talk.messages, message]), 1)
        if prompt is None:
            return talk if turn else Talk([], dropped=dropped or "too long for a row")
        answer = yield Request(
            prompt, number, min(config.max_new_tokens, config.sequence_length - len(prompt)), config.sampling
        )
        talk.messages.append(message)
        said = conversation_text(tokenizer, talk.messages) + tokenizer.decode(answer.tokens, skip_special_tokens=False)
        talk.tokens = [*prompt, *answer.tokens]
        talk.answers.append((len(prompt), len(talk.tokens)))
        reply = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        talk.messages.append({"role": "assistant", "content": reply})
        if answer.tokens[-1] not in tokenizer.stops:
            return talk
    return talk


def _unusable(tokenizer: Tokenizer, question: list[int], words: str) -> str | None:
    """Why a user's turn cannot be used."""
    if question[-1] not in tokenizer.stops:
        return "with a question that did not end"
    special = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    if special & {*question[:-1], *_ids(tokenizer, words)}:  # or its name, which a template would make one
        return "with a special token in the question"
    return None if words and "\ufffd" not in words else "with an empty or broken question"


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _assemble(config: Synthesize, tokenizer: Tokenizer, talks: dict[int, Talk], console: Console) -> dict:
    kept = list(_kept(talks).values())[: config.conversations + config.heldout_prompts]
    heldout = (
        {int(i) for i in np.linspace(0, len(kept) - 1, config.heldout_prompts)} if config.heldout_prompts else set()
    )
    training = [talk for i, talk in enumerate(kept) if i not in heldout]
    with fresh_folder(config.out) as folder:
        documents = [talk.document for talk in training]
        counts = write_documents(documents, folder, config.sequence_length, tokenizer.stops)
        copy_tokenizer(config.target, folder / "tokenizer")
        prompts = {HELDOUT: f"prompts/{HELDOUT}.jsonl"} if heldout else {}
        for path in prompts.values():
            (folder / "prompts").mkdir()
            asked = [[m["content"] for m in kept[i].messages if m["role"] == "user"] for i in sorted(heldout)]
            write_text(
                folder / path, "".join(json.dumps({"turns": turns}, ensure_ascii=False) + "\n" for turns in asked)
            )
        lines = (json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n" for talk in training)
        write_text(folder / "conversations.jsonl", "".join(lines))
        manifest = counts | {
            **described(folder / "tokenizer", tokenizer),
            "sequence_length": config.sequence_length,
            "bad_records": 0,
            "source": f"synthesized by {config.target}",
            "prompts": prompts,
            "template_args": template_arguments(config.template_args),
        }
        write_manifest(folder, manifest)
    print_example(console, tokenizer, documents[0])
    print_summary(console, config.out, manifest, plain_text=False)
    console.print(
        f"{len(talks)} conversations begun, {len(_kept(talks))} could be used; {_said(talks)}", highlight=False
    )
    return manifest
