"""The Python blocks of seed 004, part 1: Quick Start, hooks, scaling, own data, inference, with our imports.

One model has the seed's own size, 768 × 12; where a block does not fix the size, the others are narrower.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from omnilatent import LatentNeuralHook, OmniLatentConfig, OmniLatentModel, UserError
from omnilatent.omni.examples import collate
from omnilatent.omni.saving import load
from omnilatent.omni.tokenizer import ByteTokenizer
from omnilatent.training import Trainer, collate_multimodal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def default() -> OmniLatentModel:
    """The model that `OmniLatentConfig()` is."""
    torch.manual_seed(0)
    return OmniLatentModel(OmniLatentConfig()).to(DEVICE)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 224, 224).to(DEVICE)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 32000, (1, 64)).to(DEVICE)


def test_quick_start_at_its_own_size(default: OmniLatentModel, image: Tensor, tokens: Tensor) -> None:
    with torch.no_grad():
        logits = default("image", image, "text")["output"]
        made = default("text", tokens, "image")["output"]
    assert logits.shape == (1, 196, 32000) and made.shape == (1, 3, 224, 224)
    assert logits.isfinite().all() and made.isfinite().all()


def test_quick_start_as_it_is_written_with_gradients(image: Tensor, tokens: Tensor) -> None:
    model = OmniLatentModel(OmniLatentConfig(**NARROW)).to(DEVICE)
    logits = model("image", image, "text")["output"]
    assert logits.shape == (1, 196, 32000) and logits.requires_grad
    assert model("text", tokens, "image")["output"].shape == (1, 3, 224, 224)
    assert model.reconstruct("image", image)["output"].shape == (1, 3, 224, 224)
    results = model.forward_multimodal(inputs={"text": tokens, "image": image}, target_modalities=["text", "image"])
    assert list(results) == ["text", "image"] and results["image"]["output"].shape == (1, 3, 224, 224)
    assert results["text"]["output"].shape == (1, 1 + 64 + 196, 32000)  # the second source's own token counts too


def test_using_hooks(default: OmniLatentModel) -> None:
    image = torch.randn(1, 3, 32, 32).to(DEVICE)  # four tokens
    with torch.no_grad():
        before = default("image", image, "text")["output"]
    hook = LatentNeuralHook(name="style_control", num_tokens=8, dim=768, target_layers=[0, 1, 2, 3, 4, 5], gate_bias_init=-4.0,
                            use_transform=True)
    default.register_hook(hook)
    result = default("image", image, "text")
    assert not torch.equal(result["output"], before)
    optimizer = torch.optim.AdamW(default.parameters(), lr=1e-4)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in known for p in hook.parameters())
    wanted = torch.autograd.grad(result["output"].square().mean(), [hook.tokens, hook.gate_bias])
    assert all(gradient.abs().sum() > 0 for gradient in wanted)
    default.remove_hook("style_control")
    with torch.no_grad():
        assert torch.equal(default("image", image, "text")["output"], before)


def test_scaling_the_config(default: OmniLatentModel) -> None:
    tiny, larger = OmniLatentConfig(hidden_dim=128, num_layers=4, num_heads=4), OmniLatentConfig(
        hidden_dim=1024, num_layers=16, num_heads=16)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in OmniLatentModel(config).parameters()) for config in (tiny, larger)]
    middle = sum(p.numel() for p in default.parameters())
    assert sizes[0] < 0.1 * middle and sizes[1] > 2 * middle
    assert middle == pytest.approx(120.4e6, rel=2e-3)  # the seed says ~140 M, its own code has 127.8 M


@pytest.mark.parametrize("modality", ["text", "image"])
def test_inference(modality: str, image: Tensor, tokens: Tensor) -> None:
    model = OmniLatentModel(OmniLatentConfig(**NARROW)).to(DEVICE)
    model.eval()
    data = {"text": tokens, "image": image}
    with torch.no_grad():
        assert model(modality, data[modality], "text")["output"].shape[2] == 32000
        token_ids = model.generate(modality, data[modality], max_len=64)
        assert token_ids.dtype == torch.int64 and token_ids.shape[0] == 1 and token_ids.shape[1] <= 64
        reconstructed = model.reconstruct("image", image)["output"]
        results = model.forward_multimodal(inputs=data, target_modalities=["text", "image"])
    assert reconstructed.shape == (1, 3, 224, 224) and set(results) == {"text", "image"}


# -- training with your own data -----------------------------------------------------------------------------------


def example(i: int) -> dict[str, Tensor]:
    """By the seed's table, with short sounds and videos."""
    return {"text": torch.randint(1, 32000, (3 + i % 3,)), "audio": torch.rand(128, 40), "image": torch.rand(3, 224, 224),
            "video": torch.rand(3, 4, 112, 112)}


def own_config(**changes: object) -> OmniLatentConfig:
    return OmniLatentConfig(**NARROW | {"batch_size": 4, "learning_rate": 3e-4, "max_steps": 100_000, "mixed_precision": True,
                                        "gradient_checkpointing": True} | changes)  # type: ignore[arg-type]


def test_training_with_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = own_config(max_steps=3)
    model = OmniLatentModel(config)
    before = model.backbone.layers[0].state_dict()
    before = {name: t.clone() for name, t in before.items()}
    dataloader = DataLoader([example(i) for i in range(8)], batch_size=config.batch_size, collate_fn=collate_multimodal, shuffle=True)
    trainer = Trainer(model, config, dataloader)
    with pytest.warns(UserWarning, match=r"which is no byte's, and Trainer was given no tokenizer: what it saves lacks one"):
        trainer.train()
    assert any(not torch.equal(t, before[name]) for name, t in model.backbone.layers[0].state_dict().items())
    (run,) = Path("runs").iterdir()
    with pytest.raises(UserError, match="lacks its tokenizer"):
        load(run)
    assert (run / "final" / "model.safetensors").exists()


def test_the_training_fields_are_those_that_count() -> None:
    for mixed, checkpointing in ((True, False), (False, True)):
        config = own_config(mixed_precision=mixed, gradient_checkpointing=checkpointing)
        trainer = Trainer(OmniLatentModel(replace(config, gradient_checkpointing=True)), config, [])
        run, optimizer = trainer.config.run, trainer.config.optimizer
        assert (run.steps, run.batch_size, run.amp, optimizer.lr) == (100_000, 4, mixed, 3e-4)
        assert trainer.task.given.backbone.checkpointing == checkpointing


def test_batches_have_any_subset_of_the_modalities(tmp_path: Path) -> None:
    class Loader:
        drawn: list[str] = []

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for names in (["image"], ["text", "audio"], ["video", "image", "text"]):
                self.drawn.append("+".join(names))
                yield collate_multimodal([{name: example(i)[name] % 259 if name == "text" else example(i)[name] for name in names}
                                          for i in range(2)])

    loader = Loader()
    config = own_config(max_steps=3, batch_size=2)
    Trainer(OmniLatentModel(config), config, loader, out=tmp_path / "run").train()
    assert loader.drawn == ["image", "text+audio", "video+image+text"]
    assert load(tmp_path / "run").tokenizer.decode([4 + 97 - 1]) == "a"  # all ids were bytes


GOOD = {"text": torch.full((2, 3), 5), "image": torch.rand(2, 3, 16, 16)}


@pytest.mark.parametrize(("batch", "kind", "sentence"), [
    ({}, UserError, "a batch holds modalities of the model, text, audio, image, video; got nothing"),
    ({"smell": GOOD["image"]}, UserError, "text, audio, image, video; got smell"),
    ({"image": GOOD["image"][:, :1]}, ValueError, r"image is floating point \(b, 3, height, width\); got \(2, 1, 16, 16\)"),
    ({"image": GOOD["image"], "text": GOOD["text"][:1]}, UserError, "as many examples of every modality, .* got {'image': 2, 'text': 1}"),
    ({"image": GOOD["image"][:0]}, UserError, "one at least; got {'image': 0}"),
    ({"audio": torch.rand(2, 128, 0)}, ValueError, r"audio is .* with nothing empty; got \(2, 128, 0\)"),
    ({"video": torch.rand(2, 3, 0, 16, 16)}, ValueError, r"video is .* with nothing empty; got \(2, 3, 0, 16, 16\)"),
    ({"text": GOOD["text"].float()}, ValueError, r"text is token ids \(b, tokens\), int64"),
    ({"text": GOOD["text"] - 6}, ValueError, "text has the ids 0 to 31999; got -1"),
    (None, UserError, "the data loader gives no batch: its data set is empty, or smaller than a batch"),
])
def test_a_batch_that_cannot_be_is_told(batch, kind: type[Exception], sentence: str, tmp_path: Path) -> None:  # noqa: ANN001
    config = own_config(max_steps=1, batch_size=2)
    with pytest.raises(kind, match=sentence):
        Trainer(OmniLatentModel(config), config, [] if batch is None else [batch], out=tmp_path / "run").train()


def test_examples_that_are_no_batch_are_told() -> None:
    with pytest.raises(UserError, match="have the same modalities; got text, image and text"):
        collate_multimodal([{name: t[0] for name, t in GOOD.items()}, {"text": GOOD["text"][0]}])
    with pytest.raises(UserError, match=r"audio of a batch has one shape; got \(128, 40\) and \(128, 41\): crop or pad"):
        collate_multimodal([{"audio": torch.rand(128, frames)} for frames in (40, 41)])
    with pytest.raises(UserError, match=r"image of a batch has one shape; got \(3, 8, 8\) and \(3, 8, 9\): crop or pad"):
        collate([{"text": "a", "image": torch.rand(3, 8, wide)} for wide in (8, 9)], ByteTokenizer())
