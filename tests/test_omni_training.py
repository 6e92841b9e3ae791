"""Training the any-to-any model: pairs as promised, resumed = uninterrupted, the door from Python, and that it learns."""

import gc
import json
import math
import re
import sys
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from omnilatent import LatentNeuralHook, OmniLatentConfig, OmniLatentModel, UserError
from omnilatent.cli.main import main
from omnilatent.data.captions import CocoCaptionsDataset, open_captioned
from omnilatent.data.mel import MelSpec, read_sound
from omnilatent.omni.config import MODALITIES, OmniModelConfig, OmniTraining, PairConfig
from omnilatent.omni.examples import omni_batches, open_examples
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.losses import info_nce
from omnilatent.omni.pairs import Job, Plan, jobs_at
from omnilatent.omni.recipes import WORLD, debug_omni, omni_coco
from omnilatent.omni.saving import load
from omnilatent.omni.task import OmniTask
from omnilatent.omni.tokenizer import ByteTokenizer
from omnilatent.training import Trainer, collate_multimodal
from omnilatent.training.config import OptimizerConfig, RunConfig
from omnilatent.training.loop import launch_fabric, train

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from omni_losses import first_terms  # noqa: E402


def test_pairs_are_drawn_by_phase_as_promised_and_counted() -> None:
    coco = omni_coco()
    (before, copies), (after, pairs) = Plan(coco.pairs, coco.model.modalities, 0, 5_000).counted(coco.run.batch_size)
    assert before == range(750) and after == range(750, 5_000)
    assert set(copies) == {"text→text", "image→image"} and copies.total() == 1_500 and pairs.total() == 8_500
    share = {pair: n / pairs.total() for pair, n in pairs.items()}
    assert share["image→text"] == pytest.approx(0.35, abs=0.015) == share["text→image"]
    assert share["text→text"] + share["image→image"] == pytest.approx(0.30, abs=0.015)
    ((_, every),) = Plan(PairConfig(fused_share=0.0, jobs=2), MODALITIES, 0, 5_000).counted(64)
    assert len(every) == 16 and all(n / 10_000 == pytest.approx(1 / 16, abs=0.01) for n in every.values())


def test_several_sources_at_once_come_as_often_as_asked_for_and_text_never_flows() -> None:
    jobs = [job for step in range(2_000) for job in jobs_at(PairConfig(fused_share=0.5, flow_share=0.5), MODALITIES, 1, step, 2_000)]
    several = sum(len(job.sources) > 1 for job in jobs) / len(jobs)
    assert several == pytest.approx(0.5 * 7 / 8, abs=0.02)  # one in eight adds no other source
    assert len({job.sources for job in jobs}) == 15  # whatever their order, which recordings would be made for
    assert not any(job.flowing for job in jobs if job.target == "text")
    assert sum(job.flowing for job in jobs) / sum(job.target != "text" for job in jobs) == pytest.approx(0.5, abs=0.03)


def test_a_share_of_what_flows_has_no_source() -> None:
    config = PairConfig(fused_share=0.5, flow_share=0.5, unconditional_share=0.2)
    jobs = [job for step in range(2_000) for job in jobs_at(config, MODALITIES, 1, step, 2_000)]
    assert sum(not job.sources for job in jobs if job.flowing) / sum(job.flowing for job in jobs) == pytest.approx(0.2, abs=0.03)
    assert all(job.sources for job in jobs if not job.flowing)


def test_info_nce_is_small_for_pairs_and_large_for_others() -> None:
    latents, temperature = torch.eye(5, 9), 0.5
    others = math.log(1 + 4 * math.exp(-1 / temperature))  # of unit vectors at right angles
    scale = torch.rand(5, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    assert float(info_nce(latents * scale, latents, temperature)) == pytest.approx(others, rel=1e-5)
    assert float(info_nce(latents, latents.roll(1, 0), temperature)) == pytest.approx(1 / temperature + others, rel=1e-5)
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # either side is asked: of b both have the first partner
    ways = math.log(1 + math.exp(-2)) / 2 + math.log(1 + math.exp(2)) / 2, math.log(2)
    assert float(info_nce(a, b, temperature)) == pytest.approx(sum(ways) / 2, rel=1e-5)


def test_latents_of_a_pair_are_alike_after_learning_with_the_contrastive_weight_and_not_without() -> None:
    after = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = OmniLatentModel(OmniModelConfig(**{**WORLD, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "image_size": (16, 16)},
                                                modalities=("text", "image")))
        data = {"text": torch.arange(3, 11)[:, None].expand(-1, 4), "image": torch.rand(8, 3, 16, 16)}
        learning = OmniLearning(model, PairConfig(contrastive_weight=weight, flow_share=0.0))
        optimizer = torch.optim.AdamW(learning.parameters(), 3e-3)
        for job in 10 * [Job(("text",), "image", False), Job(("image",), "text", False)]:
            optimizer.zero_grad()
            learning(job, learning.needs(job, data, torch.Generator()))["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            text, image = (model.read({name: t}).latent for name, t in data.items())
        found = torch.nn.functional.cosine_similarity(text[:, None], image[None], dim=-1).argmax(1)
        after[weight] = float(info_nce(text, image)), float((found == torch.arange(8)).float().mean())
    print(after)
    assert after[1.0][0] < 0.1 < 0.5 < after[0.0][0] and after[1.0][1] == 1 > after[0.0][1]


def test_grey_pictures_come_from_workers_as_one_channel_and_are_the_same() -> None:
    model = debug_omni().model
    training, _ = open_examples("digits", None, 0, model)
    plan = Plan(PairConfig(jobs=2), MODALITIES, 0, 6)
    there, here = (list(omni_batches(training, ByteTokenizer(), plan, 8, 0, 6, workers=workers)) for workers in (1, 0))
    seen = 0
    for batch, other in zip(there, here, strict=True):
        halved, moved = batch.halved(), batch.map(lambda t: t.to(torch.float64 if t.is_floating_point() else t.dtype))
        for (job, data), (_, same), (_, half), (_, wide) in zip(batch.parts, other.parts, halved.parts, moved.parts, strict=True):
            for name in job.names:
                alone = training.sample(seen, [name])[name] if name != "text" else None
                assert torch.equal(data[name], same[name]) and torch.equal(half[name], data[name][:2])
                assert torch.equal(wide[name].to(data[name].dtype), data[name])
                if alone is not None:
                    torch.testing.assert_close(data[name][0], alone, atol=1e-5, rtol=0)
                if name in ("image", "video"):
                    assert data[name].stride(1) == half[name].stride(1) == wide[name].stride(1) == 0 and data[name].shape[1] == 3
            seen += 4
    own = collate_multimodal([training.sample(0, ["image"])])["image"]
    own[0, 0] = 2.0  # a batch of the user's may be written into
    assert own[0, 1].max() <= 1


def test_the_digits_world_is_for_models_of_its_sizes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for name, size, said in (("image", ["64", "48"], "images are 32×32, and the model's are 48×64"),
                             ("video", ["16", "16"], "videos are 32×32, and the model's are 16×16")):
        assert main(["train", "debug-omni", f"--{name}-size", *size, "--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_learning_rate_rises_over_a_twentieth_of_the_run_at_most() -> None:
    for steps, warmup, expected in ((100, 2_000, 1 / 5), (100, 2, 1 / 2), (10, 2_000, 1)):
        config = replace(debug_omni(), optimizer=OptimizerConfig(lr=1e-3, warmup=warmup), run=replace(debug_omni().run, steps=steps))
        task = OmniTask(config, "digits", None, lambda file, reason: None)
        task.setup(launch_fabric(replace(config.run, device="cpu")))
        task.step(next(iter(task.batches(0, 1))), 0)
        assert task.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * expected)
        task.close()


def test_a_run_can_be_stopped_and_resumed_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "debug-omni", "--out", str(whole)]) == 0
    assert main(["train", "debug-omni", "--out", str(parts)]) == 0
    assert main(["train", "--resume", str(parts / "step-4")]) == 0
    first, second = (load_file(run / "final" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = load(whole)
    assert model.tokenizer.decode(model.tokenizer.encode("acht ☂")) == "acht ☂" and model.mel is not None and model.mel.rate == 8_000
    card = (whole / "final" / "README.md").read_text(encoding="utf-8")
    assert "omnilatent train debug-omni" in card and "image→image psnr" in card
    assert (whole / "samples" / "step-12.png").exists()


def test_what_a_model_says_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    from omnilatent.omni.saving import save

    torch.manual_seed(0)
    model = OmniLatentModel(OmniModelConfig(hidden_dim=32, num_layers=2, num_heads=2, **WORLD)).eval()
    save(tmp_path, model, ByteTokenizer(), None, "card")
    again, image = load(tmp_path), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for target in MODALITIES:
            assert torch.equal(model("image", image, target)["output"], again("image", image, target)["output"])


def test_the_weights_of_the_losses_are_in_the_optimiser_and_move(tmp_path: Path) -> None:
    config = debug_omni()
    task = OmniTask(config, "digits", None, lambda file, reason: None)
    train(task, config.run, tmp_path, launch_fabric(config.run), quiet=True)
    known = {id(p) for group in task.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in task.bare.parameters()}
    weights = task.bare.weights.log_variance
    assert set(weights) == {"text", "audio", "image", "video", "audio flow", "image flow", "video flow"}
    assert all(p.item() != 0 for p in weights.values())


def test_the_recipes_have_the_sizes_of_the_digits_world() -> None:
    model, sample = debug_omni().model, open_examples("digits", None, 0, debug_omni().model)[0].sample(0)
    assert sample["image"].shape[1:] == model.image_size and sample["audio"].shape == (model.mel_bands, model.mel_frames)
    assert sample["video"].shape[1:] == (model.video_frames, *model.video_size)


def test_no_term_drowns_another_when_training_begins() -> None:
    for codec in ("", "kl-f8-small"):
        terms = first_terms("digits", codec)
        assert len(terms) == 10 and max(terms.values()) / min(terms.values()) < 3


class Toy(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"text": torch.full((1 + i % 3,), 3 + i), "image": torch.rand(3, 16, 16, generator=generator)}


def test_the_trainer_takes_a_model_a_configuration_and_a_loader(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=259, image_size=(16, 16), batch_size=4,
                              learning_rate=3e-3, max_steps=30, mixed_precision=True, gradient_checkpointing=True)
    model = OmniLatentModel(config)
    loader = DataLoader(Toy(), batch_size=config.batch_size, collate_fn=collate_multimodal, shuffle=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, config, loader, out=tmp_path / "run", run=RunConfig(validate_every=30, log_every=10))
    figures = trainer.train()
    assert -figures["fit"] < 1.6  # from 2 or more
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in still if "audio" not in name and "video" not in name] == ["nothing"], still  # had no data
    assert load(tmp_path / "run").config.hidden_dim == 32


class Noted(Toy):
    """Notes what is read of it."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.read.append(i)
        return super().__getitem__(i)


def test_a_run_of_the_trainer_goes_on_where_its_shuffled_loader_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 of 10 steps and then the rest, 4 batches a pass: the same weights, best and order as without the break."""
    def trainer(out: Path, data: Toy, steps: int = 10) -> Trainer:
        torch.manual_seed(0)
        config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=259, image_size=(16, 16), batch_size=2,
                                  max_steps=steps, gradient_checkpointing=False)
        loader = DataLoader(data, batch_size=2, collate_fn=collate_multimodal, shuffle=True)
        return Trainer(OmniLatentModel(config), config, loader, out=out, run=RunConfig(save_every=3, validate_every=2, keep=9, device="cpu"))

    whole, parts, once, again = tmp_path / "whole", tmp_path / "parts", Noted(), Noted()
    figures = trainer(whole, once).train()
    assert len(once.read) == 20 and sorted(once.read[:8]) == sorted(once.read[8:16]) == list(range(8))
    assert once.read[:8] != once.read[8:16]  # each pass in another order
    trainer(parts, Noted()).train()
    went_on = trainer(tmp_path / "other", again)
    assert went_on.train(resume=parts / "step-6") == figures and went_on.out == parts
    assert again.read == once.read[8:]  # not the first pass; of the second, the half that it had is passed over
    first, second = (load_file(run / "final" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert trainer(parts, Noted()).train(resume=parts) == figures  # the run's folder stands for its furthest checkpoint
    with pytest.raises(UserError, match="parts holds a run already: go on with train.resume=.*parts'., or give another out"):
        trainer(parts, Noted()).train()
    with pytest.raises(UserError, match="there is no run; give the folder that holds its run.json"):
        trainer(tmp_path / "new", Noted()).train(resume=tmp_path / "nowhere" / "step-1")
    assert main(["train", "--resume", str(parts)]) == 2
    assert "parts is a run of Trainer: go on with it in Python" in " ".join(capsys.readouterr().err.split())


def test_a_loader_without_length_goes_on_over_its_passes(tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return ({"text": torch.full((1, 2), 3 + number)} for number in range(3))

    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, modalities=("text",), vocab_size=259, batch_size=1)
    model = OmniLatentModel(config)
    whole, later = ([int(batch["text"][0, 0]) for batch in islice(Trainer(model, config, Endless()).task._given(start), 20)]
                    for start in (0, 7))
    assert later[:13] == whole[7:] and whole[:7] == [3, 4, 5, 3, 4, 5, 3]
    with pytest.raises(UserError, match="an iterator or generator cannot be begun again: give a DataLoader"):
        list(islice(Trainer(model, config, iter(Endless())).task._given(0), 4))


def test_a_model_of_own_spectrograms_hears_and_makes_sound_files_when_it_knows_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = MelSpec(rate=8_000, n_fft=256, hop=64, bands=16, low=50.0, high=4_000.0)
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=259, modalities=("text", "audio"), mel_bands=16,
                              mel_frames=40, batch_size=2, max_steps=2)
    own = [{"text": torch.tensor(ByteTokenizer().encode("hum")), "audio": spec.to_mel(torch.rand(39 * 64))} for _ in range(4)]
    loader = DataLoader(own, batch_size=2, collate_fn=collate_multimodal)
    for out, known in (("known", {"mel": spec, "tokenizer": ByteTokenizer()}), ("unknown", {})):
        Trainer(OmniLatentModel(config), config, loader, out=out, **known).train()
    assert load("known").mel == spec
    assert main(["translate", "known", "--text", "hum", "--to", "audio", "--out", "hum.wav"]) == 0
    assert read_sound(Path("hum.wav"), 8_000).shape == (39 * 64,)
    assert main(["translate", "known", "hum.wav", "--to", "text"]) == 0
    assert main(["evaluate", "known", "--mode", "file", "--input-file", "hum.wav", "--target", "audio"]) == 0
    assert Path("hum-audio.wav").stat().st_size == 44 + 2 * 39 * 64
    capsys.readouterr()
    for argv in (["--text", "hum", "--to", "audio"], ["hum.wav", "--to", "text"]):
        assert main(["translate", "unknown", *argv]) == 2
        assert capsys.readouterr().err.strip() == (
            "omnilatent: this model does not say what its mel spectrograms are, so it neither hears nor makes sound files: train by "
            "a recipe, or give Trainer its mel.")
    with pytest.raises(ValueError, match="the MelSpec has 128 bands; the model's mel_bands is 16"):
        Trainer(OmniLatentModel(config), config, loader, mel=MelSpec())
    with pytest.raises(ValueError, match="the tokenizer has 259 ids; the model's vocab_size is 40"):
        Trainer(OmniLatentModel(replace(config, vocab_size=40)), config, loader, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="the configuration's num_layers is 7, and the model's"):
        Trainer(OmniLatentModel(config), replace(config, num_layers=7), loader)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, modalities=("text",), batch_size=1, max_steps=1)
    trainer = Trainer(OmniLatentModel(config), config, [{"text": torch.tensor([[300]])}], out=tmp_path / "run",
                      tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="a text has the id 300, and the tokenizer has the ids 0 to 258"):
        trainer.train()


def test_a_hook_is_trained_alone_and_the_model_is_let_go(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=259, image_size=(16, 16), batch_size=4, max_steps=3)
    model = OmniLatentModel(config)
    model.register_hook(LatentNeuralHook("h", 2, 32, [0]))
    model.freeze_base()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, config, DataLoader(Toy(), batch_size=4, collate_fn=collate_multimodal), out=tmp_path / "run")
    trainer.train()
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] != []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.startswith("hooks"))
    assert all(p.grad is None for p in model.parameters())
    task = weakref.ref(trainer.task)
    del trainer
    gc.collect()
    assert task() is None


def test_it_learns_to_name_and_to_copy_digits(tmp_path: Path) -> None:
    """400 steps on scikit-learn's digits: far above chance and the mean picture, on held-out ones."""
    config = OmniTraining(
        model=OmniModelConfig(hidden_dim=64, num_layers=2, num_heads=4, modalities=("text", "image"), gradient_checkpointing=False,
                              **WORLD),
        pairs=PairConfig(jobs=2, fused_share=0.0, flow_share=0.0),
        optimizer=OptimizerConfig(optimizer="muon", lr=1e-2, betas=(0.9, 0.95), warmup=10, ema_decay=0.9),
        run=RunConfig(steps=400, batch_size=32, validate_every=400, save_every=1_000, workers=0, device="cpu"))
    task = OmniTask(config, "digits", None, lambda file, reason: None)
    figures = train(task, config.run, tmp_path, launch_fabric(config.run), quiet=True)
    mean = torch.stack([task.examples.sample(i)["image"] for i in range(200)]).mean(0)
    held = torch.stack([task.held_out.sample(i)["image"] for i in range(64)])
    null = float(-10 * (held - mean).square().flatten(1).mean(1).log10().mean())
    print(figures, null)
    assert figures["text→text"] == 1.0 and figures["image→text"] > 0.5
    assert figures["image→image psnr"] > null + 4


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--accumulate", "2"], "--accumulate is not for omni recipes"),
    (["--data", "nowhere"], "nowhere"),
    (["--guidance", "2"], "--guidance 2 needs a part that is learned without a source: give --unconditional-share 0.1"),
    (["--fused-share", "2"], "--fused-share is a share, 0 to 1; got 2"),
    (["--init", "kl-f8-small"], "kl-f8-small is a model of the kind 'kl', which turns no modality into another"),
    (["--flow-share", "0"], "--flow-share 0 learns no flow: give --flow-steps 0 too"),
    (["--flow-share", "1"], "--flow-share 1 learns no regression, which makes what is among the sources: give --copy-steps 8 too"),
    (["--modalities", "text", "smell"], "there is no modality 'smell'; there are text, audio, image, video"),
    (["--modalities", "text", "image", "text"], "every modality is named once; got text, image, text"),
    (["--mel-bands", "80"], "digits: the digits world's sounds have 64 mel bands, and the model's 80"),
    (["--max-tokens", "219"], "--max-tokens 219: the sources and the target of a step take up to 220 tokens: give at least 220"),
    (["--max-tokens", "10", "--fused-share", "0", "--data", "synthetic"], "take up to 129 tokens: give at least 129"),
    (["--validation-examples", "0"], "--validation-examples is 0; the least is 1"),
    (["--reconstruction-share", "nan"], "--reconstruction-share is a share, 0 to 1, or -1; got nan"),
    (["--vocab-size", "300"], "Unrecognized options: --vocab-size"),
])
def test_bad_input_gives_one_sentence(argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug-omni", "--out", str(tmp_path / "run"), *argv]) == 2
    told = capsys.readouterr()
    assert sentence in " ".join((told.err + told.out).replace("│", " ").split()) and "Traceback" not in told.err
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_leaves_what_was_in_the_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.mine").write_text("dear", encoding="utf-8")
    assert main(["train", "debug-omni", "--out", str(tmp_path), "--max-tokens", "10"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["events.out.tfevents.1.mine"]


def test_a_budget_of_just_enough_tokens_is_enough(tmp_path: Path) -> None:
    assert main(["train", "debug-omni", "--out", str(tmp_path / "run"), "--max-tokens", "220", "--fused-share", "1", "--steps", "8"]) == 0


def test_recordings_alone_are_no_digits_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fsdd").mkdir()
    (tmp_path / "0_ann_0.flac").write_bytes(b"a sound")
    with tarfile.open(tmp_path / "fsdd" / "train.tar", "w") as tar:
        tar.add(tmp_path / "0_ann_0.flac", "0_ann_0.flac")
    for data in (tmp_path / "fsdd", tmp_path):
        assert main(["train", "debug-omni", "--data", str(data), "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == (f"omnilatent: {data} holds spoken digits and no handwritten ones: give the folder that holds "
                                           "mnist/ (MNIST's files) and fsdd/ (train.tar and test.tar).\n")


def test_a_model_to_start_from_keeps_its_sizes_aloud_and_its_run_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    short = ["--validation-examples", "1", "--batch-size", "4"]
    assert main(["train", "debug-omni", "--hidden-dim", "16", "--steps", "1", "--out", first, *short]) == 0
    argv = ["train", "debug-omni", "--init", first, "--out", second, *short, "--steps", "5"]
    capsys.readouterr()
    for more, sentence in ((["--hidden-dim", "64"], f"--init {first} keeps its own model, of hidden_dim 16: leave --hidden-dim out."),
                           (["--flow-steps", "9"], f"--init {first} keeps its own model, of flow_steps 8: leave --flow-steps out.")):
        assert main([*argv, *more]) == 2 and capsys.readouterr().err == f"omnilatent: {sentence}\n" and not Path(second).exists()
    assert main([*argv, "--gradient-checkpointing"]) == 0  # which changes no result
    assert f"the model is that of --init {first}: 2 layers of 16" in capsys.readouterr().out
    (tmp_path / "first").rename(tmp_path / "gone")
    whole = load_file(tmp_path / "second" / "final" / "model.safetensors")
    assert main(["train", "--resume", f"{second}/step-4"]) == 0
    again = load_file(tmp_path / "second" / "final" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_80_columns_show_the_numbers_of_training_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "debug-omni", "--out", str(tmp_path / "run-of-a-rather-long-name"), "--steps", "2"]) == 0
    bar = next(line for line in capsys.readouterr().out.splitlines() if "2/2" in line)
    last = json.loads((tmp_path / "run-of-a-rather-long-name" / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    learned = [name for name in last if name not in ("step", "part", "gradient_norm")]
    assert "…" not in bar and len(bar) <= 80 and all(f"{name} {last[name]:.3g}" in bar for name in learned[:3])


@pytest.mark.parametrize(("batches", "sentence"), [
    ([(torch.rand(2, 3, 16, 16),)], "whose first axis are the examples, as collate_multimodal makes it; got tuple"),
    ([np.zeros((2, 3))], "got ndarray"), ([None], "got NoneType"),
    ([{"image": np.zeros((2, 3, 16, 16))}], "got image as ndarray"), ([{"text": torch.tensor(3)}], "got text as a single number"),
    ([], "the data loader gives no batch: its data set is empty, or smaller than a batch"),
    ([{"image": torch.rand(2, 1, 16, 16)}], r"image is floating point \(b, 3, height, width\); got \(2, 1, 16, 16\)"),
])
def test_a_loader_of_something_else_is_told_in_a_sentence(batches: list[object], sentence: str, tmp_path: Path) -> None:
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=259, image_size=(16, 16), batch_size=2, max_steps=1)
    trainer = Trainer(OmniLatentModel(config), config, batches, out=tmp_path / "run")
    with pytest.raises(ValueError, match=sentence):
        trainer.train()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="dataloader is a DataLoader, or another object that gives batches; got NoneType"):
        Trainer(trainer.task.given, config, None)


def test_memory_that_ran_out_is_answered_with_options_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size that is named is one of which every job's part fits."""
    learned = OmniTask._learn

    def hungry(self: OmniTask, key, data):  # noqa: ANN001, ANN202
        if max(map(len, data.values())) > 1:
            raise torch.OutOfMemoryError("CUDA")
        return learned(self, key, data)

    monkeypatch.setattr(OmniTask, "_learn", hungry)
    config = debug_omni()  # 8 examples for 4 jobs
    with pytest.raises(UserError, match="Out of memory at step 0 with batches of 8: begin anew with --batch-size 4, which fits, or "
                                        "--gradient-checkpointing; what was saved before is untouched."):
        train(OmniTask(config, "digits", None, lambda file, reason: None), config.run, tmp_path / "run", launch_fabric(config.run),
              quiet=True)
    small = OmniLatentConfig(**WORLD, hidden_dim=32, num_layers=1, num_heads=2, batch_size=2, max_steps=1)
    monkeypatch.setattr(OmniTask, "_learn", lambda self, key, data: torch.empty(2**48))
    with pytest.raises(UserError, match="batches of 2: give batches of fewer examples, or set gradient_checkpointing=True"):
        Trainer(OmniLatentModel(small), small, [{"text": torch.full((2, 2), 5)}], out=tmp_path / "own").train()


def coco(folder: Path, pictures: int = 12) -> Path:
    """A folder of pictures with COCO's own JSON."""
    images, annotations = [], []
    for number in range(pictures):
        pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:012}.png")
        images.append({"id": 100 + number, "file_name": f"{number:012}.png"})
        annotations += [{"image_id": 100 + number, "id": 5 * number + n, "caption": f" caption {n} of {number}.\n"} for n in range(2)]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


TINY = ["--hidden-dim", "32", "--num-layers", "1", "--num-heads", "2", "--image-size", "16", "16", "--batch-size", "4", "--steps",
        "2", "--validation-examples", "2", "--workers", "0", "--text-tokens", "12"]


def test_omni_coco_learns_from_cocos_own_json_and_from_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco(tmp_path)
    assert main(["train", "omni-coco", "--data", str(data), "--out", str(tmp_path / "run"), *TINY]) == 0
    told = " ".join(capsys.readouterr().out.split())
    drawn = re.findall(r"pairs drawn in the steps (\d+) to (\d+): ((?:\w+→\w+ \d+(?:, )?)+)", told)
    assert "held out" in told and [(first, last) for first, last, _ in drawn] == [("1", "1"), ("2", "2")]
    counts = [{pair: int(n) for pair, n in re.findall(r"(\w+→\w+) (\d+)", pairs)} for _, _, pairs in drawn]
    assert counts == [dict(each) for _, each in Plan(omni_coco().pairs, ("text", "image"), 0, 2).counted(4)]
    assert [sum(each.values()) for each in counts] == [2, 2] and set(counts[0]) <= {"text→text", "image→image"}
    dataset = CocoCaptionsDataset(data, data / "annotations" / "captions_val2017.json", size=16)
    first = dataset[3]
    assert first["image"].shape == (3, 16, 16) and bytes(i - 3 for i in first["text"].tolist()).decode().endswith(" of 3.")
    said = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        said.add(tuple(dataset[3]["text"].tolist()))
    assert len(said) == 2  # both captions get their turn
    (data / f"{4:012}.png").write_bytes(b"no picture")
    assert main(["train", "omni-coco", "--data", str(data), "--out", str(tmp_path / "broken"), *TINY, "--steps", "12"]) == 0
    listed = (tmp_path / "broken" / "skipped.jsonl").read_text(encoding="utf-8")
    assert f"{4:012}.png" in listed and "Traceback" not in capsys.readouterr().err
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number in range(4):
            (tmp_path / "text").write_text("one line\nanother\n")
            tar.add(tmp_path / f"{number:012}.png", f"{number:012}.png")
            tar.add(tmp_path / "text", f"{number:012}.txt")
    training, held_out = open_captioned(str(tmp_path / "pairs.tar"), None, 16)
    keys = [{part.source.key(i) for i in range(len(part))} for part in (training, held_out)]
    assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == 4
    assert held_out.sample(0)[1] == "one line" and {training.sample(i)[1] for i in range(20)} == {"one line", "another"}
    (tmp_path / "annotations" / "captions_val2017.json").write_text("[]")
    assert main(["train", "omni-coco", "--data", str(data), "--out", str(tmp_path / "other"), *TINY]) == 2
    assert "captions_val2017.json is not COCO's JSON of captions" in " ".join(capsys.readouterr().err.split())


def test_omni_coco_learns_from_captions_of_coco_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(__file__).parents[1].parent / "shared" / "data" / "coco-captions-mini"
    if not data.exists():
        pytest.skip("../shared/data/coco-captions-mini is not here")
    assert main(["train", "omni-coco", "--data", str(data), "--out", str(tmp_path / "run"), *TINY, "--validate-every", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+ examples \(.*coco-captions-mini.*\), \d+ held out", said), said
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {name for row in rows for name in row if "→" in name} == {"text→text", "text→image psnr", "image→text", "image→image psnr"}
    assert load(tmp_path / "run").config.modalities == ("text", "image") and not (tmp_path / "run" / "skipped.jsonl").exists()


def test_a_model_of_four_modalities_learns_and_is_validated_on_the_two_that_the_examples_have(tmp_path: Path) -> None:
    data = coco(tmp_path)
    argv = ["--steps", "2", "--validate-every", "1", "--validation-examples", "2", "--text-tokens", "12"]
    assert main(["train", "debug-omni", "--data", str(data), "--out", str(tmp_path / "run"), *argv]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(name for name in row if "→" in name) for row in rows if "fit" in row] == 2 * [
        {"text→text", "text→image psnr", "image→text", "image→image psnr"}]


def test_synthetic_examples_are_of_the_models_sizes(tmp_path: Path) -> None:
    assert main(["train", "debug-omni", "--data", "synthetic", "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    model = load(tmp_path / "run")
    training, _ = open_examples("synthetic", None, 0, model.config)
    sample = training.sample(3)
    assert sample["image"].shape == (3, 32, 32) and sample["video"].shape == (3, 8, 32, 32) and sample["audio"].shape == (64, 64)
    assert torch.equal(sample["image"], training.sample(3)["image"]) and not torch.equal(sample["image"], training.sample(4)["image"])
