"""Data, tokenizers and targets that fit each other, and what is said of those that may not."""

import functools
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from rich.console import Console

from specauf_jax.architecture import Target
from specauf_jax.commands import loading
from specauf_jax.commands.benchmark_settings import Benchmark
from specauf_jax.commands.evaluate_settings import Evaluate
from specauf_jax.commands.generate_settings import Generate
from specauf_jax.commands.prepare import prepare
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.commands.train import _check_mask
from specauf_jax.config import Mesh, Sampling
from specauf_jax.data import tokenizer as tokenizers
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.prompts import Prompt
from specauf_jax.models.target import TargetStep
from specauf_jax.models.weights import save_drafter, save_target
from specauf_jax.sharding import make_mesh

V = 300
CHAT = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b c"}]}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def said(console):
    return console.file.getvalue()


@pytest.fixture
def target(tmp_path):
    """A folder with a tokenizer of up to V tokens, as of a target."""
    tokenizers.train_bpe(["a b c d e f " * 50], V, tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def data(tmp_path, target, console):
    return make_data(tmp_path / "data", target, console)


def make_data(out, folder, console, row=CHAT):
    source = out.with_suffix(".jsonl")
    source.write_text(json.dumps(row) + "\n")
    prepare(Prepare(out=str(out), input=(str(source),), tokenizer=str(folder), sequence_length=64), console)
    return out


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_data_of_the_targets_own_tokenizer_fits(data, target):
    manifest = loading.read_data(data, Target(vocab_size=V), target)
    assert manifest["template_args"] == {} and manifest["largest_token_id"] < V
    (target / "chat_template.jinja").write_text(tokenizers.CHATML + "\n")  # as save_pretrained writes it
    content = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(content))
    loading.read_data(data, Target(vocab_size=V), target)
    (target / "tokenizer.json").unlink()
    loading.read_data(data, Target(vocab_size=V), target)


def test_another_chat_template_is_refused_for_conversations_alone(tmp_path, data, target, console):
    (target / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(SpecaufError, match="made with another chat template than that of"):
        loading.read_data(data, Target(vocab_size=V), target)
    manifest = json.loads((data / "manifest.json").read_text())
    edit(data / "manifest.json", supervised_share=1.0)
    loading.read_data(data, Target(vocab_size=V), target)
    edit(data / "manifest.json", **manifest)
    tokenizers.train_bpe(["f e d c " * 50], V, target)
    (target / "chat_template.jinja").unlink()
    with pytest.raises(SpecaufError, match="made with another tokenizer than that of"):
        loading.read_data(data, Target(vocab_size=V), target)


def test_tokens_that_no_text_holds_need_no_embedding(tmp_path, target, console):
    edit(target / "tokenizer_config.json", pad_token="[PAD]")
    size = len(tokenizers.load_tokenizer(target))
    fits = make_data(tmp_path / "data", target, console)
    assert loading.read_data(fits, Target(vocab_size=size - 1), target)["vocab_size"] == size
    row = json.loads(json.dumps(CHAT).replace("a b", "a [PAD]"))
    holds = make_data(tmp_path / "other", target, console, row)
    with pytest.raises(SpecaufError, match=f"holds token {size - 1}, the target has {size - 1} of them"):
        loading.read_data(holds, Target(vocab_size=size - 1), target)


def test_manifests_of_earlier_versions(data, target):
    manifest = json.loads((data / "manifest.json").read_text())
    for key in ("template_args", "largest_token_id"):
        del manifest[key]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert loading.read_data(data, Target(vocab_size=V), target)["template_args"] == {}
    with pytest.raises(SpecaufError, match="holds token"):
        loading.read_data(data, Target(vocab_size=manifest["vocab_size"] - 1), target)


def test_requests_hold_only_tokens_with_embeddings_and_fit():
    target = Target(vocab_size=9, max_position_embeddings=8)
    loading.check_requests([[8, 1], []], target, 6)
    with pytest.raises(SpecaufError, match="a prompt holds token 9"):
        loading.check_requests([[1], [1, 9]], target, 6)
    with pytest.raises(SpecaufError, match="a prompt of 2 tokens and 7 new ones"):
        loading.check_requests([[8, 1]], target, 7)


def test_template_arguments_of_the_drafters_training(target, console):
    (target / "chat_template.jinja").write_text("{{ think }}{{ day }}")

    def arguments(given, origin):
        return loading.with_arguments(tokenizers.load_tokenizer(target), given, origin, console).template_args

    trained = {"template_args": {"think": False}}
    assert arguments((), {}) == arguments((), {"steps": 1}) == {}
    assert arguments((), trained) == arguments(("think=false",), trained) == {"think": False}
    assert arguments(("day=26 Jul 2024",), {}) == {"day": "26 Jul 2024"}
    assert said(console) == ""
    assert arguments(("think=True",), trained) == {"think": True}
    assert "warning: the drafter was trained with template arguments {'think': False}, not {'think': True}" in said(
        console
    )
    assert arguments((), {"template_args": {"other": 1}}) == {}
    assert "trained with template argument 'other', which the chat template does not read" in said(console)


def test_models_stop_where_the_targets_files_say(target, console):
    config = tiny.target_config(vocab_size=V)
    folder = target.with_name("model")
    save_target(tiny.target_params(config), config, folder, eos_token_id=5)
    tokenizers.copy_tokenizer(target, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    drafter = tiny.drafter_config(config, target_layer_ids=(0, 1), mask_token_id=3)
    origin = {"tokenizer_sha256": tokenizers.hashes(folder)[0], "template_args": {}}
    for provenance, warned in ((origin, False), (origin | {"tokenizer_sha256": "0"}, True)):
        save_drafter(tiny.drafter_params(drafter), drafter, target.with_name("drafter"), provenance=provenance)
        models = loading.load_models(
            str(folder), str(target.with_name("drafter")), "float32", make_mesh(Mesh()), console
        )
        assert models.decoding.stop_tokens == models.autoregressive.stop_tokens == (0, 2, 5, 7)
        models.tell_clock([Prompt("a", ()), Prompt(None, ("a",))], console)
        assert "clock" not in said(console)
        assert ("trained with another tokenizer file" in said(console)) == warned

    models.tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizers.CHATML
    models.tell_clock([Prompt("a", ())], console)
    assert "clock" not in said(console)
    models.tell_clock([Prompt("a", ()), Prompt(None, ("a",))], console)
    assert said(console).count("warning: the chat template writes the date or time of the clock") == 1


def test_a_mask_token_that_texts_hold_is_told(data, console):
    config = SimpleNamespace(data=str(data))
    tokenizer = tokenizers.load_tokenizer(data / "tokenizer")
    row = {"tokens": np.array([4, 5, 0]), "document_ids": np.array([1, 1, 0])}

    def warned(mask, own=3):
        manifest = {"mask_token_id": own, "vocab_size": len(tokenizer)}
        before = len(said(console))
        _check_mask(config, mask, manifest, [row], console)
        return said(console)[before:]

    before = said(console)
    assert "mask token 5 stands in 1 of the 1 rows looked at" in warned(5)
    assert "mask token 0 is '<|endoftext|>', which texts may hold" in warned(0)
    assert "mask token 2 is '<|im_end|>'" in warned(2) and "mask token 9 is" in warned(9)
    assert warned(3) == warned(3, own=None) == warned(V + 5) == "" and before in said(console)


def test_how_many_tokens_may_be_verified():
    regenerate = {"data": "d", "target": "t", "out": "o", "drafter": "x"}
    generate = {"target": "t", "drafter": "x", "prompts": "p"}
    makers = (
        functools.partial(Regenerate, **regenerate),
        functools.partial(Generate, **generate),
        functools.partial(Evaluate, target="t", drafter="x", prompts=("p",), out="o"),
        functools.partial(Benchmark, target="t", prompts="p", out="o"),
    )
    for make in makers:
        for slots in (None, 2, 99, "auto"):
            assert make(verify_slots=slots).verify_slots == slots
        for slots in (1, 0, -3):
            with pytest.raises(SpecaufError, match=f"verify_slots is {slots}"):
                make(verify_slots=slots)
    for make in makers[:3]:
        make(verify_slots=3, sampling=Sampling(0.5))
        with pytest.raises(SpecaufError, match="auto above temperature 0"):
            make(verify_slots="auto", sampling=Sampling(0.5))
        assert make(tree_nodes=5).tree_nodes == 5
        with pytest.raises(SpecaufError, match="tree_nodes is 0"):
            make(tree_nodes=0)
        with pytest.raises(SpecaufError, match="verify_slots 2 with tree_nodes 5"):
            make(tree_nodes=5, verify_slots=2)
    with pytest.raises(SpecaufError, match="tree_nodes is 2 without --drafter"):
        Regenerate(**{**regenerate, "drafter": None}, tree_nodes=2)
    with pytest.raises(SpecaufError, match="verify_slots is 2 without --drafter"):
        Regenerate(**{**regenerate, "drafter": None}, verify_slots=2)
    with pytest.raises(SpecaufError, match="verify_slots is 'auto' with --method autoregressive"):
        Generate(**{**generate, "drafter": None}, method="autoregressive", verify_slots="auto")


def test_more_verified_tokens_than_the_block_holds_are_refused():
    options = {"params": None, "requests": [], "batch_size": 1, "mesh": None, "console": Console(quiet=True)}
    decoding = Decoding(TargetStep(tiny.target_config(), (0, 1)), tiny.drafter_config())
    for slots in (0, 5):
        with pytest.raises(SpecaufError, match=f"verify_slots {slots}.*\n.*from 1 to the 4 of the drafter's block"):
            loading.with_drafts(decoding, slots, None, 1.0, **options)
    assert loading.with_drafts(decoding, None, None, 1.0, **options) == decoding
    for slots in (2, 4):
        assert loading.with_drafts(decoding, slots, None, 1.0, **options).block_size == slots
    assert loading.with_drafts(decoding, None, 6, 0.5, **options).tree_temperature == 0.5
