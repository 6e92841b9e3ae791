"""The any-to-any model: every pair, invisible padding, one read for many targets, caches, causality, fusion, hooks."""

import itertools

import pytest
import torch
from torch import Tensor

from omnilatent import LatentHookConfig, LatentNeuralHook, OmniLatentConfig, OmniLatentModel
from omnilatent.omni.decoding import greedy_logits
from omnilatent.omni.flow import flow, on_the_way, shifted

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


def test_beam_search_is_never_less_likely_than_greedy() -> None:
    model, data = small(), examples(4)
    model.text_part().embedding.weight.mul_(20)  # far from uniform
    source = model.read({"image": data["image"]})

    def likelihood(ids: Tensor) -> Tensor:
        labels = model.text_part().labels(ids)
        logp = model.text_logits(source, ids).log_softmax(-1)
        each = logp.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
        return each.sum(1) / (labels >= 0).sum(1)

    one, many = (model.generate("image", data["image"], max_len=6, beams=beams) for beams in (1, 39))
    ended = (one != 0).sum(1) < 6  # a text that was cut has no end to count
    both = ended & ((many != 0).sum(1) < 6)
    assert (likelihood(many)[both] >= likelihood(one)[both] - 1e-5).all()
    drawn = [model.generate("image", data["image"], max_len=6, temperature=2.0) for _ in range(2)]
    assert torch.equal(*drawn) and not (one[:, :1] == drawn[0][:, :1]).all()
    assert torch.equal(model.generate("image", data["image"], max_len=6, temperature=2.0, top_p=1e-6), one)


def test_no_parameter_is_dead_and_checkpointing_changes_no_gradient() -> None:
    from omnilatent.omni.config import PairConfig
    from omnilatent.omni.learning import OmniLearning
    from omnilatent.omni.pairs import Job

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
            # a transform that ends in zeros gives its first layers no gradient in the first step
            assert [name for name in dead if "transform" not in name] == []
            gradients.append({name: p.grad for name, p in learning.named_parameters()})
            torch.manual_seed(0)
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5), name


def test_a_closed_gate_and_a_removed_hook_leave_every_bit() -> None:
    model, data = small(), examples()
    before = model.forward_multimodal(data, MODALITIES)
    written = model.generate("image", data["image"], max_len=6)
    hook = LatentNeuralHook("hook", num_tokens=4, dim=32, target_layers=[0, 1, 2], gate_bias_init=2.0)
    model.register_hook(hook)
    assert any(p is hook.tokens for p in model.parameters())

    def same() -> bool:
        after = model.forward_multimodal(data, MODALITIES)
        return (all(torch.equal(before[name]["output"], after[name]["output"]) for name in MODALITIES)
                and torch.equal(model.generate("image", data["image"], max_len=6), written))

    assert not same()
    with model.disable_hooks():
        assert same()
    hook.gate_bias.fill_(-1e4)
    assert same()
    model.remove_hook("hook")
    assert same()


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
    (lambda m, d: m.register_hook("h"), "register_hook takes a LatentNeuralHook; got str"),
    (lambda m, d: small(num_heads=0), "num_heads is at least 1; got 0"),
    (lambda m, d: small(image_size=(0, 8)), r"image_size is at least 1; got \(0, 8\)"),
    (lambda m, d: m.probe(3, "image", d["image"]), "the layers 0 to 2; got 3"),
])
def test_what_cannot_be_is_told_in_a_sentence(call, sentence: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=sentence):
        call(small(max_tokens=1000), examples())


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
