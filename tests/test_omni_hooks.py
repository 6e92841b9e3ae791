"""A hook's tokens and voice, and the four uses of hooks in examples/hooks.py on a small model trained here, each beside its null."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from omnilatent import LatentNeuralHook, OmniLatentConfig, OmniLatentModel
from omnilatent.data.digit_world import WORDS, open_world
from omnilatent.errors import UserError
from omnilatent.omni.config import OmniModelConfig
from omnilatent.omni.losses import text_terms
from omnilatent.omni.recipes import WORLD
from omnilatent.omni.saving import load, save
from omnilatent.omni.tokenizer import ByteTokenizer
from omnilatent.training.muon import Muon
from omnilatent.training.schedule import warmup_cosine

USES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "hooks.py")))
STEPS, LEARNED_FROM, BATCH = 200, 1_000, 32


@pytest.fixture(scope="module")
def lesson():  # noqa: ANN201
    """A model of 200,000 parameters that reads most of scikit-learn's digits, in its untrained weights the same every time."""
    torch.manual_seed(0)
    model = OmniLatentModel(OmniModelConfig(hidden_dim=64, num_layers=3, num_heads=4, gradient_checkpointing=False,
                                            modalities=("text", "image"), **WORLD))
    model.tokenizer = ByteTokenizer()
    training, test = open_world("digits")
    pictures = USES.Pictures.of(training, LEARNED_FROM, torch.device("cpu"))
    lesson = USES.Lesson(model, pictures, USES.Pictures.of(test, len(test), torch.device("cpu")), STEPS)
    part, ids = model.text_part(), lesson.ids(WORDS)
    optimizer = Muon(model.parameters(), 5e-3, (0.9, 0.95), tables=[part.embedding.weight])
    for step in range(STEPS):
        rows = torch.randint(LEARNED_FROM, (BATCH,))
        wanted = ids[pictures.labels[rows]]
        loss = text_terms(model.text_logits(model.read({"image": pictures.images[rows]}), wanted), part.labels(wanted))
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * warmup_cosine(step, STEPS, 20, 0.0)
        optimizer.zero_grad()
        loss["cross_entropy"].backward()
        optimizer.step()
    model.eval()
    yield lesson
    assert not model.hooks  # every use takes its hook away again


def test_a_hook_teaches_german_with_less_than_a_hundredth_of_the_parameters_and_is_forgotten(lesson, tmp_path: Path) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    figures = USES.language(replace(lesson, steps=300), out=tmp_path / "german")
    english = figures["before: English"]
    assert english > 0.7 and figures["before: German"] == 0 and figures["share of the parameters"] < 0.01
    assert figures["with the hook: German"] > 0.75 * english and figures["with the hook: English"] < 0.05
    assert figures["removed: English"] == english and figures["removed: German"] == 0
    assert figures["weights as before"] and figures["answers as before"]
    lesson.model.register_hook(LatentNeuralHook.load(tmp_path / "german"))
    assert lesson.share(USES.GERMAN, {"image": lesson.held_out.images}) == figures["with the hook: German"]
    lesson.model.remove_hook("german")


def test_no_last_state_says_a_letter_that_the_model_never_wrote(lesson) -> None:  # noqa: ANN001
    """Why a hook needs a voice: of all last states there can be, the best for l gives it a small probability."""
    part, norm = lesson.model.text_part(), lesson.model.backbone.norm
    letter = torch.tensor(lesson.model.tokenizer.encode("l"))
    x = nn.Parameter(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([x], 0.05)
    for _ in range(300):
        loss = nn.functional.cross_entropy(part.logits(norm(x)), letter)
        optimizer.zero_grad()
        loss.backward(inputs=[x])
        optimizer.step()
    assert loss > 2.0


def test_a_fact_that_is_given_at_call_time_is_used_and_another_digits_misleads(lesson) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    figures = USES.knowledge(replace(lesson, steps=150))
    assert figures["told the fact"] > figures["told nothing"] + 0.05
    assert figures["told another digit's fact"] < figures["told nothing"] - 0.05 and figures["weights as before"]


def test_digits_are_read_off_the_layers_and_off_a_hook_that_is_not_felt(lesson) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    figures = USES.inspect(lesson)
    assert len(figures) == 2 + 2 * 3 and figures["null: shuffled labels"] < 0.25
    assert figures["layer 2: content"] > 0.6 and figures["layer 2: reader"] > 0.5


def test_digits_are_named_by_touch(lesson) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    figures = USES.modality(lesson)
    assert figures["by touch"] > 0.6 and figures["another digit's touch"] < 0.25 and figures["weights as before"]


def test_the_example_runs_from_a_saved_model_and_tells_mistakes_in_a_sentence(
    lesson, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: ANN001
) -> None:
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", lesson.model, ByteTokenizer(), None, "card")
    USES.main(["modality", "--model", str(tmp_path / "run"), "--steps", "2"])
    printed = capsys.readouterr().out
    assert "by touch" in printed and re.search("weights as before +yes", printed)
    run = str(tmp_path / "run")
    for arguments, sentence in ((["--model", str(tmp_path)], "is no any-to-any model"), (["--model", run, "--steps", "0"], "at least 1"),
                                (["--model", run, "--data", str(tmp_path)], "holds no digits"),
                                (["--model", run, "--tokens", "99"], "has room for 0 to"),
                                (["--model", run, "--out", run], "is there already")):
        with pytest.raises(SystemExit) as end:
            USES.main(["language", *arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2 and sentence in said and said.startswith("hooks.py: ") and said.count("\n") == 1
    assert load(run).config == lesson.model.config


# -- the tokens ----------------------------------------------------------------------------------------------------


def small(**changes: object) -> tuple[OmniLatentModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = OmniLatentConfig(hidden_dim=32, num_layers=3, num_heads=2, vocab_size=40, modalities=("text", "image"), image_size=(16, 16),
                              image_patch=8, text_tokens=6, flow_steps=2, gradient_checkpointing=False)
    return OmniLatentModel(replace(config, **changes)).eval(), {"text": torch.randint(3, 40, (2, 5)), "image": torch.rand(2, 3, 13, 18)}


@torch.no_grad()
def test_a_hooks_state_waits_for_its_next_layer_and_goes_on_from_there() -> None:
    model, data = small()
    hook, twin = (LatentNeuralHook("hook", 2, 32, layers, gate_bias_init=1.0) for layers in ([0, 2], [2]))
    nn.init.normal_(hook.transform[-1].weight)
    hook.gate_bias[0] = -1e4  # it sees in layer 0 and is not felt there, so that only its own state tells it from its twin
    twin.load_state_dict(hook.state_dict() | {"gate_bias": hook.gate_bias[1:]})
    begun, states = hook.tokens.expand(2, -1, -1), []
    for one in (hook, twin):
        model.register_hook(one)
        states.append([model.probe(layer, "image", data["image"]) for layer in range(3)])
        model.remove_hook("hook")
    (first, waited, went_on), (late, still, alone) = states
    assert not torch.allclose(first["hook"], begun, atol=1e-2) and torch.equal(waited["hook"], first["hook"])
    assert torch.equal(late["hook"], begun) and torch.equal(still["hook"], begun)
    assert torch.equal(waited["content"], still["content"])
    assert not torch.allclose(went_on["hook"], alone["hook"], atol=1e-2)
    assert not torch.allclose(went_on["content"], alone["content"], atol=1e-3)


@torch.no_grad()
def test_a_transform_changes_what_a_hook_says_in_its_next_layer() -> None:
    outputs = {}
    for layers in ((0, 2), (2,)):  # without a next layer there is nothing to change
        model, data = small()
        hook = LatentNeuralHook("hook", 2, 32, layers, gate_bias_init=1.0)
        model.register_hook(hook)
        unchanged = model("image", data["image"], "image")["output"]
        nn.init.normal_(hook.transform[-1].weight)
        outputs[layers] = unchanged, model("image", data["image"], "image")["output"]
    assert not torch.allclose(*outputs[0, 2], atol=1e-3) and torch.equal(*outputs[2,])


def test_a_hook_has_the_same_gradients_with_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, data = small(gradient_checkpointing=checkpointing)
        hook = LatentNeuralHook("hook", 2, 32, [0, 2], gate_bias_init=1.0, voice=4)
        for weight in (hook.transform[-1].weight, hook.up):
            nn.init.normal_(weight)
        model.register_hook(hook)
        model.freeze_base()
        for source in (model.read({"image": data["image"]}), model.prefix({"image": data["image"]})):
            model.text_logits(source, data["text"]).square().mean().backward()
        gradients.append({name: p.grad for name, p in hook.named_parameters()})
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("hooks."))
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7), name


@torch.no_grad()
def test_a_compiled_model_takes_hooks_and_is_what_it_was_without_them() -> None:
    model, data = small(num_layers=2)
    compiled = torch.compile(model, backend="aot_eager")

    def output(of: nn.Module) -> Tensor:
        return of("image", data["image"], "image")["output"]

    before = output(compiled)
    hook = LatentNeuralHook("late", 2, 32, [0, 1], gate_bias_init=1.0)
    model.register_hook(hook)
    assert torch.equal(output(compiled), output(model)) and not torch.allclose(output(compiled), before, atol=1e-3)
    hook.gate_bias.neg_()  # what was compiled reads the hook's weights anew
    assert torch.equal(output(compiled), output(model))
    with model.disable_hooks():
        assert torch.equal(output(compiled), before)
    model.remove_hook("late")
    assert torch.equal(output(compiled), before) and torch.equal(output(model), before)


# -- the voice -----------------------------------------------------------------------------------------------------


def spoken(**changes: object) -> tuple[OmniLatentModel, dict[str, Tensor], LatentNeuralHook]:
    """A model with a hook whose voice is no longer zero."""
    model, data = small(**changes)
    hook = LatentNeuralHook("loud", 2, 32, [0, 1], gate_bias_init=1.0, use_transform=False, voice=4)
    nn.init.normal_(hook.up)
    model.register_hook(hook)
    return model, data, hook


@torch.no_grad()
def test_a_closed_voice_leaves_every_bit_and_an_open_one_reaches_every_target() -> None:
    model, data, hook = spoken()
    with model.disable_hooks():
        before = model.forward_multimodal({"image": data["image"]}, ["text", "image"])
    hook.gate_bias[:-1] = -1e4  # its tokens are not attended to, its voice is heard
    after = model.forward_multimodal({"image": data["image"]}, ["text", "image"])
    hook.gate_bias.fill_(-1e4)
    closed = model.forward_multimodal({"image": data["image"]}, ["text", "image"])
    for target, result in before.items():
        assert not torch.allclose(result["output"], after[target]["output"], atol=1e-3)
        assert torch.equal(result["output"], closed[target]["output"]) and torch.equal(result["latent"], after[target]["latent"])


@torch.no_grad()
def test_a_voice_needs_no_tokens() -> None:
    model, data = small()
    before = model.generate("image", data["image"], 6)
    model.register_hook(LatentNeuralHook("voice", 0, 32, [0], gate_bias_init=0.0, use_transform=False, voice=4))
    assert torch.equal(model.generate("image", data["image"], 6), before)
    nn.init.normal_(model.hooks["voice"].up)
    assert not torch.equal(model.generate("image", data["image"], 6), before)
    assert model.probe(0, "image", data["image"])["voice"].shape == (2, 0, 32)


@torch.no_grad()
def test_a_voice_is_heard_alike_token_by_token_and_in_beam_search() -> None:
    model, data, _ = spoken()
    source = model.read({"image": data["image"]})
    logits, memory, steps = model.text_logits(source, data["text"]), source.memory, []
    for position, vector in enumerate(model.text_part().shifted(data["text"]).split(1, 1)):
        x, memory = model.write_on(memory, vector, position)
        steps.append(model.text_part().logits(x))
    assert torch.allclose(torch.cat(steps, 1), logits, atol=1e-5)
    with model.disable_hooks():
        plain = model.generate("image", data["image"], 6, beams=3)
    assert not torch.equal(model.generate("image", data["image"], 6, beams=3), plain)


def test_a_voice_learns_begins_silent_and_goes_to_disk(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, data, hook = spoken(gradient_checkpointing=checkpointing)
        model.text_logits(model.read({"image": data["image"]}), data["text"]).square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in hook.parameters())
        gradients.append([p.grad for p in hook.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    hook.save(tmp_path / "loud")
    again = LatentNeuralHook.load(tmp_path / "loud")
    assert again.config == hook.config and all(torch.equal(a, b) for a, b in zip(hook.parameters(), again.parameters(), strict=True))
    hook.save(tmp_path / "loud")  # a hook takes the place of a hook, and of nothing else
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="letters is there and holds no hook"):
        hook.save(tmp_path / "letters")
    assert not LatentNeuralHook("fresh", 2, 32, voice=4).up.any() and LatentNeuralHook("mute", 2, 32).voice is None
    for name in ("keys", "training"):
        with pytest.raises(ValueError, match=f"PyTorch's modules use the name '{name}' themselves: give the hook another"):
            LatentNeuralHook(name, 2, 32)
    with pytest.raises(ValueError, match="voice >= 0; got 2, 32, \\[0\\], -1"):
        LatentNeuralHook("bad", 2, 32, voice=-1)
