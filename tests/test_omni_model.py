"""The any-to-any model: every pair, invisible padding, one read for many targets, caches, causality, fusion, hooks."""

import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention

from omnilatent import LatentHookConfig, LatentNeuralHook, OmniLatentConfig, OmniLatentModel, UserError
from omnilatent.omni.config import PairConfig
from omnilatent.omni.decoding import _choose, greedy_logits
from omnilatent.omni.flow import draw, flow, on_the_way, shifted
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.modalities import REGISTRY
from omnilatent.omni.pairs import Job
from omnilatent.omni.patches import Patches, PatchModality
from omnilatent.omni.text import PAD

SMALL = dict(hidden_dim=32, num_layers=3, num_heads=2, vocab_size=40, image_size=(16, 16), image_patch=8, video_size=(8, 8),
             video_frames=4, video_patch=(2, 8), mel_frames=8, mel_bands=4, text_tokens=6, flow_steps=2, gradient_checkpointing=False)
MODALITIES = ("text", "audio", "image", "video")


def small(**changes: object) -> OmniLatentModel:
    torch.manual_seed(0)
    return OmniLatentModel(OmniLatentConfig(**{**SMALL, **changes})).eval()  # type: ignore[arg-type]


def examples(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    return {"text": torch.randint(3, 40, (batch, 5), generator=generator), "audio": rand(batch, 4, 11), "image": rand(batch, 3, 13, 18),
            "video": rand(batch, 3, 5, 9, 8)}


@pytest.fixture(autouse=True)
def no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(("source", "target"), itertools.product(MODALITIES, MODALITIES))
def test_every_modality_becomes_every_other(source: str, target: str) -> None:
    data = examples()
    first, second = (small()(source, data[source], target)["output"] for _ in range(2))
    assert first.isfinite().all() and torch.equal(first, second)
    shapes = {"audio": (2, 4, 8), "image": (2, 3, 16, 16), "video": (2, 3, 4, 8, 8)}
    if target == "text":
        assert first.shape == (2, {"text": 5, "audio": 3, "image": 6, "video": 6}[source], 40)
    elif target == source:
        assert first.shape == data[source].shape  # any size in, the same size out
    else:
        assert first.shape == shapes[target]


def test_a_picture_is_put_together_again_from_its_patches() -> None:
    for name, data in examples().items():
        if name != "text":
            part = small().part(name)
            assert torch.allclose(part.join(part.cut(data), part.size_of(data)), data, atol=1e-6)


def test_a_flow_is_drawn_by_the_generator_that_is_given() -> None:
    model, text = small(), examples()["text"]
    usual, again = (model("text", text, "image")["output"] for _ in range(2))
    first, same, other = (model("text", text, "image", generator=torch.Generator().manual_seed(seed))["output"] for seed in (1, 1, 2))
    assert torch.equal(usual, again) and torch.equal(first, same)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in itertools.combinations((usual, first, other), 2))


def test_attention_has_no_dense_mask_where_nothing_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        masks.append(attn_mask)
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr("omnilatent.nn.transformer.scaled_dot_product_attention", spy)
    model, data = small(), examples()
    model.register_hook(LatentNeuralHook("hook", 2, 32, [0, 2]))
    model("image", data["image"], "image")
    model("image", data["image"], "video")
    model.patches(model.prefix({"image": data["image"]}), "image", (13, 18))
    assert len(masks) > 20 and all(mask is None for mask in masks)
    masks.clear()
    model("image", data["image"], "text")
    for source in (model.read({"image": data["image"]}), model.prefix({"image": data["image"]})):
        model.text_logits(source, data["text"])
    assert {type(mask) for mask in masks} == {type(None), CausalBias}  # which makes no mask for kernels that need none
    masks.clear()
    model("text", data["text"], "image")  # ids may be padding
    assert any(type(mask) is Tensor for mask in masks)


def test_a_fifth_modality_is_one_row_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "depth", lambda c: PatchModality(
        "depth", c.hidden_dim, Patches(1, (1, 8, 8)), (16, 16), lambda made, true: {"l1": torch.nn.functional.l1_loss(made, true)}))
    names = ("text", "image", "depth")
    model, data = small(modalities=names), {**examples(), "depth": torch.rand(2, 1, 16, 16)}
    for source, target in itertools.product(names, names):
        output = model(source, data[source], target)["output"]
        assert output.isfinite().all() and (target == "text" or output.shape[:2] == data[target].shape[:2])
    learning = OmniLearning(model, PairConfig()).train()
    with torch.enable_grad():
        for job in (Job(("depth",), "text", False), Job(("text",), "depth", False), Job(("image",), "depth", True)):
            learning(job, learning.needs(job, data, torch.Generator().manual_seed(0)))["loss"].backward()
    own = {name: p for name, p in learning.named_parameters() if "depth" in name}
    assert len(own) == 7 + 1 + 2  # its part, what names it as a source, its losses' weights
    assert [name for name, p in own.items() if p.grad is None or not p.grad.any()] == []


def test_padding_is_not_seen() -> None:
    model, ids = small(), examples()["text"]
    padded = torch.nn.functional.pad(ids, (0, 4))
    image = examples()["image"]
    for inputs, longer in (({"text": ids}, {"text": padded}), ({"text": ids, "image": image}, {"text": padded, "image": image})):
        one, other = model.read(inputs), model.read(longer)
        assert torch.allclose(one.latent, other.latent, atol=1e-5)
        for make in (lambda source: model.patches(source, "video", (4, 8, 8)), lambda source: model.text_logits(source, ids)):
            assert torch.allclose(make(one), make(other), atol=1e-5)


def test_changing_any_of_several_inputs_changes_the_output_and_their_order_does_not() -> None:
    model, data = small(), examples()
    whole = model.forward_multimodal(data, ["image"])["image"]["output"]
    assert torch.equal(whole, model.forward_multimodal(dict(reversed(data.items())), ["image"])["image"]["output"])
    for name in data:
        other = data | {name: data[name].flip(1) if name == "text" else data[name] * 0.5}
        assert not torch.allclose(whole, model.forward_multimodal(other, ["image"])["image"]["output"], atol=1e-4)
        less = {key: value for key, value in data.items() if key != name}
        assert not torch.allclose(whole, model.forward_multimodal(less, ["image"])["image"]["output"], atol=1e-4)


def test_writing_token_by_token_gives_what_reading_the_whole_text_gives() -> None:
    model, ids = small(), examples()["text"]
    source = model.read({"image": examples()["image"]})
    logits = model.text_logits(source, ids)
    memory, steps = source.memory, []
    for position, vector in enumerate(model.text_part().shifted(ids).split(1, 1)):
        x, memory = model.write_on(memory, vector, position)
        steps.append(model.text_part().logits(x))
    assert torch.allclose(torch.cat(steps, 1), logits, atol=1e-5)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 37 + 3
    after = model.text_logits(source, changed)
    assert torch.equal(after[:, :4], logits[:, :4]) and not torch.allclose(after[:, 4:], logits[:, 4:], atol=1e-4)


def test_greedy_logits_are_those_of_the_text_that_is_written() -> None:
    model, source = small(), small().read({"image": examples()["image"]})
    logits = greedy_logits(model, source, 6)
    assert torch.allclose(model.text_logits(source, logits.argmax(-1)[:, :5]), logits, atol=1e-5)


def test_a_wide_beam_finds_the_likeliest_of_all_texts() -> None:
    images, texts = examples(8)["image"], torch.tensor(list(itertools.product(range(1, 5), repeat=3)))
    ends = (texts == 2).cumsum(1)
    counted = ends <= (texts == 2)  # up to the first end, which is counted too
    wide, greedy, best = [], [], []
    for seed in (1, 3, 4, 8, 9, 10):  # with which keys that stay with the wrong beam change a text
        model = small(vocab_size=5)
        part, head = model.text_part(), torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * 0.3
        part.embedding.weight.mul_(2)
        for layer in model.backbone.layers:
            layer.out.weight.mul_(8)
        part.logits = lambda x, head=head: x @ head.T  # another matrix than the embedding, or a token would be followed by itself
        for image in images:
            logits = model.text_logits(model.read({"image": image.expand(len(texts), -1, -1, -1)}), texts)[:, :3]
            logits[..., 0] = -torch.inf  # padding is never written
            each = logits.log_softmax(-1).gather(2, texts[..., None])[..., 0] * counted
            first = int((each.sum(1) / counted.sum(1)).argmax())
            best.append(texts[first].masked_fill(ends[first] > 0, 0))
        for found, beams in ((greedy, 1), (wide, 13)):  # 13: the end at once, and 3 tokens before each of 4
            ids = model.generate("image", images, max_len=3, beams=beams)
            found.extend(torch.nn.functional.pad(ids, (0, 3 - ids.shape[1])))
    same = [[torch.equal(*pair) for pair in zip(found, best, strict=True)] for found in (wide, greedy)]
    assert all(same[0]) and not all(same[1])
    assert {int((ids != 0).sum()) for ids in best} == {0, 1, 2, 3}  # of every length, three that end and one that is cut


def test_nothing_outside_the_nucleus_is_drawn() -> None:
    p, generator = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.4]), torch.Generator().manual_seed(0)
    for top_p, nucleus in ((0.3, [4]), (0.5, [2, 4]), (0.75, [2, 3, 4]), (1.0, [1, 2, 3, 4])):
        drawn = _choose(p.log().repeat(4_000, 1), 1.0, top_p, generator)
        share = torch.bincount(drawn, minlength=5) / len(drawn)
        assert drawn.unique().tolist() == nucleus
        assert torch.allclose(share[nucleus], p[nucleus] / p[nucleus].sum(), atol=0.03)


def test_what_is_drawn_is_drawn_again_and_is_not_the_likeliest() -> None:
    model, data = small(), examples(4)
    model.text_part().embedding.weight.mul_(20)  # far from uniform
    one = model.generate("image", data["image"], max_len=6)
    drawn = [model.generate("image", data["image"], max_len=6, temperature=2.0) for _ in range(2)]
    assert torch.equal(*drawn) and not (one[:, :1] == drawn[0][:, :1]).all()
    assert torch.equal(model.generate("image", data["image"], max_len=6, temperature=2.0, top_p=1e-6), one)


def test_no_parameter_is_dead_and_checkpointing_changes_no_gradient() -> None:
    data, gradients = examples(), []
    jobs = [Job((source,), target, flowing) for source in MODALITIES for target in MODALITIES for flowing in (False, True)
            if target != "text" or not flowing] + [Job((), "image", True)]
    with torch.enable_grad():
        for checkpointing in (False, True):
            model = small(gradient_checkpointing=checkpointing)
            model.register_hook(LatentNeuralHook("hook", 2, 32, [0, 2]))
            learning = OmniLearning(model, PairConfig()).train()
            generator = torch.Generator().manual_seed(0)
            for job in jobs:
                learning(job, learning.needs(job, data, generator))["loss"].backward()
            dead = [name for name, p in learning.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            # a transform that ends in zeros gives its norm and first layer no gradient in the first step
            blocked = [f"model.hooks.hook.transform.{name}" for name in ("0.weight", "1.weight", "1.bias")]
            assert set(dead) == set(blocked)
            gradients.append({name: p.grad for name, p in learning.named_parameters()})
            torch.manual_seed(0)
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5), name


def test_a_closed_gate_and_a_removed_hook_leave_every_bit() -> None:
    model, data = small(), examples()

    def made() -> dict[str, Tensor]:
        pairs = {f"{source}→{target}": model(source, data[source], target)["output"]
                 for source, target in itertools.product(MODALITIES, MODALITIES)}
        fused = {f"all→{target}": result["output"] for target, result in model.forward_multimodal(data, MODALITIES).items()}
        return pairs | fused | {"written": model.generate("image", data["image"], max_len=6)}

    before = made()
    assert len(before) == 16 + 4 + 1
    hook = LatentNeuralHook("hook", num_tokens=4, dim=32, target_layers=[0, 1, 2], gate_bias_init=2.0)
    model.register_hook(hook)
    assert any(p is hook.tokens for p in model.parameters())

    def moved() -> list[str]:
        return [name for name, output in made().items() if not torch.equal(before[name], output)]

    assert set(before) - set(moved()) <= {"written"}  # which has the likeliest tokens alone
    with model.disable_hooks():
        assert moved() == []
    hook.gate_bias.fill_(-1e4)
    assert moved() == []
    model.remove_hook("hook")
    assert moved() == []


def test_hooks_see_each_other_and_a_closed_one_is_not_seen() -> None:
    model, data = small(), examples()
    first, second = (LatentNeuralHook(name, 3, 32, [0, 1], gate_bias_init=1.0) for name in ("first", "second"))
    model.register_hook(first)
    alone = model.probe(2, "image", data["image"])
    model.register_hook(second)
    together = model.probe(2, "image", data["image"])
    assert set(together) == {"content", "first", "second"} and together["content"].shape == (2, 7, 32)
    assert not torch.allclose(alone["first"], together["first"], atol=1e-4)
    second.gate_bias.fill_(-1e4)
    closed = model.probe(2, "image", data["image"])
    assert torch.equal(alone["first"], closed["first"]) and torch.equal(alone["content"], closed["content"])


def test_a_hook_takes_knowledge_at_call_time_and_alone_goes_to_disk(tmp_path) -> None:  # noqa: ANN001
    model, data = small(), examples()
    model.register_hook(LatentNeuralHook("facts", 0, 32, [0, 1, 2], gate_bias_init=0.0, use_transform=False))
    one, other = (model("image", data["image"], "text", vectors={"facts": torch.randn(2, 5, 32)})["output"] for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-4)
    with pytest.raises(ValueError, match=r"the hook facts takes vectors \(2, n, 32\); got \(2, 5, 31\)"):
        model("image", data["image"], "text", vectors={"facts": torch.randn(2, 5, 31)})
    hook = LatentNeuralHook("kept", 2, 32, [1])
    hook.save(tmp_path / "hook")
    again = LatentNeuralHook.load(tmp_path / "hook")
    assert again.config == hook.config == LatentHookConfig("kept", 2, 32, (1,))
    assert all(torch.equal(a, b) for a, b in zip(hook.state_dict().values(), again.state_dict().values(), strict=True))


def test_only_hooks_learn_when_the_base_is_frozen() -> None:
    model = small()
    model.register_hook(LatentNeuralHook("hook", 2, 32, [0]))
    model.freeze_base()
    learning, every = model.trainable_parameters()
    assert learning == sum(p.numel() for p in model.hooks["hook"].parameters()) < every / 10


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda m, d: OmniLatentModel(OmniLatentConfig(modalities=("text", "smell"))), "there is no modality 'smell'; there are text, audio"),
    (lambda m, d: m("smell", d["image"], "text"), "there is no modality 'smell'; this model has text, audio, image, video"),
    (lambda m, d: m("image", d["image"][:, :1], "text"), r"image is floating point \(b, 3, height, width\); got \(2, 1, 13, 18\)"),
    (lambda m, d: m("audio", d["audio"][..., :0], "text"), r"audio is .* with nothing empty; got \(2, 4, 0\)"),
    (lambda m, d: m("video", d["video"][:, :, :0], "text"), r"video is .* with nothing empty; got \(2, 3, 0, 9, 8\)"),
    (lambda m, d: m("text", d["text"].float(), "image"), r"text is token ids \(b, tokens\), int64"),
    (lambda m, d: m("text", d["text"] + 100, "image"), "text has the ids 0 to 39; got"),
    (lambda m, d: m.forward_multimodal({}, ["image"]), "there is no input"),
    (lambda m, d: m.forward_multimodal({"text": d["text"], "image": d["image"][:1]}, ["image"]), "batches of {'text': 2, 'image': 1}"),
    (lambda m, d: m("image", torch.rand(1, 3, 16, 9000), "text"), "takes 2251 tokens and the model's max_tokens is 1000"),
    (lambda m, d: m.register_hook(LatentNeuralHook("h", 2, 16, [0])), "has dim 16; the model's hidden_dim is 32"),
    (lambda m, d: m.register_hook(LatentNeuralHook("h", 2, 32, [3])), "targets layer 3; the model has the layers 0 to 2"),
    (lambda m, d: m.generate("image", d["image"], max_len=0), "max_len >= 1"),
    (lambda m, d: m.generate("image", d["image"], max_len=2000), "the model's max_tokens is 1000"),
    (lambda m, d: m("image", None, "text"), "image is given as a tensor; got NoneType"),
    (lambda m, d: m.reconstruct("image", d["image"].numpy()), "image is given as a tensor; got ndarray"),
    (lambda m, d: m.generate("image"), "got no data for image"),
    (lambda m, d: m("image", d["image"], "smell"), "there is no modality 'smell'"),
    (lambda m, d: m.forward_multimodal({"text": d["text"]}, []), "the targets are some of text, audio, image, video, .* got no target"),
    (lambda m, d: m.forward_multimodal({"text": d["text"]}, ["text"], sizes={"image": (8, 8)}), "got text, and a size of image"),
    (lambda m, d: m("text", d["text"], "image", size=(16,)), r"the size of image is height, width, none below 1; got \(16,\)"),
    (lambda m, d: m("image", d["image"], "text", size=(0,)), r"the size of text is its tokens, none below 1; got \(0,\)"),
    (lambda m, d: m("text", torch.tensor([[0, 5]]), "image"), "padded with 0 at the right; got a token after a 0"),
    (lambda m, d: m("audio", torch.rand(1, 8000), "text"), r"audio is floating point \(b, 4, frames\); got \(1, 8000\)"),
    (lambda m, d: m.register_hook("h"), "register_hook takes a LatentNeuralHook or a LatentHookConfig; got str"),
    (lambda m, d: small(num_heads=0), "num_heads is at least 1; got 0"),
    (lambda m, d: m.probe(3, "image", d["image"]), "the layers 0 to 2; got 3"),
    (lambda m, d: m.register_hook(LatentNeuralHook("content", 2, 32)), "probe gives the model's own states as 'content'"),
    (lambda m, d: LatentNeuralHook("h", 2, 32, 1), "target_layers from 0 on and voice >= 0; got 2, 32, 1, 0"),
    (lambda m, d: LatentNeuralHook("h", 2, 32, [0, 0.5]), r"voice >= 0; got 2, 32, \[0, 0.5\], 0"),
    (lambda m, d: LatentNeuralHook("h", 2, 32, ["a"]), r"voice >= 0; got 2, 32, \['a'\], 0"),
    (lambda m, d: LatentNeuralHook("h", 2.5, 32), "a hook has whole numbers .*; got 2.5, 32"),
    (lambda m, d: LatentNeuralHook("h", 2, 32, gate_bias_init=math.nan), "gate_bias_init is a finite number; got nan"),
    (lambda m, d: LatentNeuralHook("h", 2, 32).begin(1, [1.0]), "the hook h takes vectors as a floating point tensor; got list"),
    (lambda m, d: LatentNeuralHook("h", 2, 32).begin(1, torch.zeros(1, 2, 32).int()), "floating point tensor; got torch.int32"),
])
def test_what_cannot_be_is_told_in_a_sentence(call, sentence: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=sentence):
        call(small(max_tokens=1000), examples())


@pytest.mark.parametrize(("changes", "sentence"), [
    (dict(guidance=math.nan), "guidance is a number from 0 on; got nan"), (dict(guidance=-1), "guidance is a number from 0 on; got -1"),
    (dict(guidance="2"), "guidance is a number from 0 on; got '2'"),
    (dict(flow_steps=1.5), "flow_steps is a whole number, at least 0; got 1.5"),
    (dict(flow_steps=-1), "flow_steps is at least 0; got -1"), (dict(num_layers=2.0), "num_layers is a whole number, at least 1; got 2.0"),
    *((dict(image_size=size), f"image_size is a tuple of two whole numbers, each at least 1; got {re.escape(repr(size))}")
      for size in (32, (0, 8), (8,), (8, 8, 8), (8.5, 8), None)),
    (dict(video_size=(8,)), "video_size is a tuple of two whole numbers"), (dict(video_patch=(1, 8, 8)), "video_patch is a tuple of two"),
    (dict(modalities=("text", "image", "text")), "every modality is named once; got text, image, text"),
    (dict(modalities="text"), "modalities is a tuple of names such as text, audio, image, video, one at least; got 'text'"),
    (dict(modalities=()), r"modalities is a tuple of .*; got \(\)"), (dict(vocab_size=3), "vocab_size is at least 4 .*; got 3"),
])
def test_what_no_model_can_be_is_refused_by_its_configuration(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OmniLatentConfig(**{**SMALL, **changes})  # type: ignore[arg-type]


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert OmniLatentConfig(modalities=["text"], image_size=[8, 9]) == OmniLatentConfig(modalities=("text",), image_size=(8, 9))


@pytest.mark.parametrize("how", [*({"temperature": value} for value in (math.nan, math.inf, -1)), *({"top_p": p} for p in (math.nan, 0, 2)),
                                 {"beams": 1.5}, {"max_len": 2.5}])
def test_a_text_is_asked_for_in_a_way_that_can_be(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="generate takes temperature >= 0 and finite, 0 < top_p <= 1, and beams >= 1"):
        small().generate("image", examples()["image"], **how)


@pytest.mark.parametrize("how", [{"guidance": math.nan}, {"guidance": -1}, {"guidance": math.inf}, {"steps": -1}, {"steps": 1.5}])
def test_a_flow_is_asked_for_in_a_way_that_can_be(how: dict[str, float]) -> None:
    model = small()
    with pytest.raises(ValueError, match="the flow takes whole steps, 0 for the regression, and a guidance from 0 on; got"):
        model.answer(model.read({"image": examples()["image"]}), "image", **how)


def test_what_does_not_fit_draws_no_noise() -> None:
    model, generator = small(max_tokens=100), torch.Generator().manual_seed(7)
    before, source = generator.get_state(), model.read({"image": examples()["image"]})
    for steps in (2, 0):
        with pytest.raises(ValueError, match="this takes 1031 tokens and the model's max_tokens is 100"):
            model.answer(source, "image", (256, 256), generator, steps)
    assert torch.equal(generator.get_state(), before)


def spoiled_hook(folder: Path, spoil: str) -> Path:
    LatentNeuralHook("kept", 2, 32, [1]).save(folder)
    weights, described = folder / "hook.safetensors", folder / "hook.json"
    own = json.loads(described.read_text(encoding="utf-8"))
    if spoil == "gone":
        weights.unlink()
    elif spoil == "garbage":
        weights.write_bytes(b"no weights")
    elif spoil == "another":
        LatentNeuralHook("loud", 2, 32, [1], voice=4).save(folder / "loud")
        (folder / "loud" / "hook.safetensors").replace(weights)
    elif spoil == "no JSON":
        described.write_text("{", encoding="utf-8")
    else:
        described.write_text(json.dumps({**own, **{"width": {"dim": 16}, "unknown": {"tone": 1}, "type": {"dim": "x"}}[spoil]}))
    return folder


@pytest.mark.parametrize(("spoil", "sentence"), [
    ("gone", "hook.safetensors is missing: copy it from where it was saved"),
    ("garbage", "hook.safetensors is not a readable .safetensors file"),
    ("another", r"holds other weights than hook.json describes, the first gate_bias \(shape \(2,\), expected \(1,\)\)"),
    ("width", r"holds other weights than hook.json describes, the first tokens \(shape \(2, 32\), expected \(2, 16\)\)"),
    ("no JSON", "hook.json is not valid JSON"), ("unknown", "hook.json describes no hook that this version knows .*'tone'"),
    ("type", "hook.json describes no hook that this version knows .*voice >= 0; got 2, x"),
])
def test_a_damaged_hook_is_told_in_a_sentence(spoil: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        LatentNeuralHook.load(spoiled_hook(tmp_path / "hook", spoil))


@pytest.mark.parametrize("values", [12, 3_072, 10**6])
def test_the_flow_ends_at_what_is_predicted_and_steps_finer_near_noise_the_more_values_there_are(values: int) -> None:
    noise, clean, seen = torch.randn(1, 1, values), torch.randn(1, 1, values), []

    def predict(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(x, on_the_way(clean, noise, time), atol=1e-5, rtol=1e-4)
        seen.append(float(time))
        return clean

    assert torch.equal(flow(predict, noise, 4), clean)
    assert seen[0] == 0 and seen == sorted(seen) and seen[1] == pytest.approx(shifted(0.25, values))
    assert shifted(0.25, values) == pytest.approx({12: 0.25, 3_072: 0.1054, 10**6: 0.04}[values], abs=1e-4)


def test_noise_and_times_for_training_are_drawn_early_and_by_the_generator() -> None:
    (noise, time), (again, same) = (draw((2_000, 2, 3), torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(noise, again) and torch.equal(time, same) and noise.shape == (2_000, 2, 3)
    assert float(time.median()) == pytest.approx(1 / (1 + math.exp(0.8)), abs=0.03) and 0 < float(time.min()) and float(time.max()) < 1
    assert float(noise.mean()) == pytest.approx(0, abs=0.03) and float(noise.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", ["text", "image"])
def test_prefix_and_target_in_one_pass_are_what_one_after_the_other_is(target: str, checkpointing: bool) -> None:
    model = small(gradient_checkpointing=checkpointing).train()
    for name, layers in (("first", [0, 2]), ("second", [1, 2])):
        model.register_hook(LatentNeuralHook(name, 2, 32, layers, gate_bias_init=1.0, voice=4))
        torch.nn.init.normal_(model.hooks[name].up)
    inputs = {"text": torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]]), "audio": examples()["audio"]}

    def made(source: object) -> Tensor:
        if target == "text":
            return model.text_logits(source, examples()["text"])
        return model.patches(source, target, (13, 18))

    with torch.enable_grad():
        outputs = [made(model.prefix(inputs)), made(model.read(inputs))]
        weights = torch.randn_like(outputs[0])
        gradients = [torch.autograd.grad((out * weights).sum(), list(model.parameters()), allow_unused=True) for out in outputs]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    for name, a, b in zip(dict(model.named_parameters()), *gradients, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    with model.disable_hooks():
        assert (made(model.prefix(inputs)) - outputs[0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_takes_data_of_any(dtype: torch.dtype) -> None:
    model, data = small().to(dtype), examples()
    for source, target in itertools.product(MODALITIES, MODALITIES):
        given = data[source] if source == "text" else data[source].double()
        assert model(source, given, target)["output"].isfinite().all()
    model.register_hook(LatentNeuralHook("late", 2, 32, [0]))
    assert model("image", data["image"], "text")["output"].isfinite().all()


def test_a_hook_is_made_of_its_configuration() -> None:
    model = small()
    hook = model.register_hook(LatentHookConfig("style", num_tokens=2, dim=32, target_layers=(0, 2)))
    assert model.hooks["style"] is hook and hook.target_layers == (0, 2) and len(hook.tokens) == 2
    assert model.register_hook(LatentNeuralHook(**asdict(replace(hook.config, name="twin")))) is model.hooks["twin"]


def test_padding_is_never_among_what_the_logits_were_made_for() -> None:
    """The text that `generate` writes, up to its end, though padding would be the likeliest."""
    model, image = small(), examples()["image"]
    embedding = model.part("text").embedding.weight
    written = model.generate("image", image, max_len=6)
    embedding[PAD] = 3 * embedding[written[0, 0]]
    logits = model("image", image, "text")["output"]
    assert (logits.argmax(-1) == PAD).any()
    again = model.generate("image", image, max_len=logits.shape[1])
    chosen = logits[..., PAD + 1 :].argmax(-1) + PAD + 1
    for row, ids in zip(chosen, again, strict=True):
        length = int((ids != PAD).sum())
        assert length and torch.equal(row[:length], ids[:length])


def test_what_is_among_the_sources_is_regressed_and_everything_else_drawn_unless_asked_for() -> None:
    model, data = small(), examples()
    both = model.read({"text": data["text"], "image": data["image"]})
    size = tuple(data["image"].shape[-2:])
    regressed, drawn = (model.answer(both, "image", size, steps=steps) for steps in (0, 2))
    assert not torch.equal(regressed, drawn)
    assert torch.equal(model.answer(both, "image", size), regressed)
    itself = model.read({"image": data["image"]})
    assert torch.equal(model.reconstruct("image", data["image"])["output"], model.answer(itself, "image", size, steps=0))
    assert torch.equal(model.answer(both, "image", size, guidance=1.0), drawn)  # guidance is of the flow
    alone = model.read({"text": data["text"]})
    assert torch.equal(model.answer(alone, "image", size), model.answer(alone, "image", size, steps=2))
    assert torch.equal(small(copy_steps=2).answer(both, "image", size), drawn)
