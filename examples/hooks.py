"""Four uses of a hook on a trained any-to-any model of the digits world, which stays as it is to the bit.

    python examples/hooks.py language --model RUN [--data DATA] [--steps 1500] [--device cuda]

- `language`: a hook of less than 1 % of the parameters teaches the model to write German number words; removed, it is forgotten.
- `knowledge`: vectors at call time say of a half-hidden digit whether it is even. The model takes them into account.
- `inspect`: what a linear probe reads from each layer, and from a hook that reads along and is not felt.
- `modality`: an encoder and a hook let the model name digits that it only touches: 16 sums over rows and columns.

RUN is a run of `omnilatent train omni`, DATA what it learned from: 'digits', or a folder with mnist/. A use takes minutes on a
CPU. Shares are of held-out digits whose word is written exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from omnilatent import LatentNeuralHook, OmniLatentModel
from omnilatent.data.digit_world import EMBEDDED, WORDS, DigitWorld, open_world
from omnilatent.devices import choose_device
from omnilatent.errors import UserError
from omnilatent.omni.evaluation import written_exactly
from omnilatent.omni.losses import text_terms
from omnilatent.omni.saving import load
from omnilatent.omni.tokenizer import pad
from omnilatent.training.schedule import warmup_cosine

GERMAN = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
LEARNED_FROM, HELD_OUT, BATCH, RATE, WARMUP = 3_000, 300, 32, 3e-2, 20
WIDEST = 64  # voice of the language hook
Figures = dict[str, float]


@dataclass(frozen=True)
class Pictures:
    """Handwritten digits: `images` `(n, 3, 32, 32)` in [0, 1] and what they are, `labels` `(n,)` in 0 … 9."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, world: DigitWorld, count: int, device: torch.device) -> Pictures:
        samples = [world.sample(i) for i in range(count)]
        return cls(torch.stack([s.image for s in samples]).to(device), torch.tensor([s.label for s in samples], device=device))


@dataclass(frozen=True)
class Lesson:
    """A trained model, and digits to learn from and to be asked about."""

    model: OmniLatentModel
    learned: Pictures
    held_out: Pictures
    steps: int = 1_500

    @classmethod
    def open(cls, run: str, data: str = EMBEDDED, steps: int = 1_500, device: str = "cpu") -> Lesson:
        """Raises UserError: no such device, RUN is no any-to-any model of pictures and text, or DATA holds no digits."""
        device = choose_device(device)
        model = load(run, device)
        missing = {"text", "image"} - set(model.modalities)
        if missing:
            raise UserError(f"{run} knows no {missing.pop()}: give a model that reads pictures and writes text.")
        training, test = open_world(data)
        place = torch.device(device)
        return cls(model, Pictures.of(training, LEARNED_FROM, place), Pictures.of(test, min(HELD_OUT, len(test)), place), steps)

    def hook(self, name: str, num_tokens: int, voice: int, gate_bias_init: float = 0.0) -> LatentNeuralHook:
        """A hook in all layers, registered; nothing else learns."""
        layers = range(self.model.config.num_layers)
        hook = LatentNeuralHook(name, num_tokens, self.model.config.hidden_dim, layers, gate_bias_init, False, voice)
        self.model.register_hook(hook)
        self.model.freeze_base()
        return hook

    def ids(self, words: Sequence[str]) -> Tensor:
        """Ten words as ids `(10, longest)`."""
        return pad([self.model.tokenizer.encode(word) for word in words]).to(self.held_out.labels.device)

    def teach(self, parameters: Iterable[nn.Parameter], words: Sequence[str], example: Callable[[Pictures], dict]) -> None:
        """Learn the digits' words from what `example` makes of a batch: the arguments of `model.read`."""
        ids, parameters = self.ids(words), list(parameters)
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for step in range(self.steps):
            rows = torch.randint(len(self.learned.labels), (BATCH,), generator=generator).to(ids.device)
            batch = Pictures(self.learned.images[rows], self.learned.labels[rows])
            wanted, part = ids[batch.labels], self.model.text_part()
            logits = self.model.text_logits(self.model.read(**example(batch)), wanted)
            loss = text_terms(logits, part.labels(wanted))["cross_entropy"]
            for group in optimizer.param_groups:
                group["lr"] = RATE * warmup_cosine(step, self.steps, WARMUP, 0.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    @torch.no_grad()
    def share(self, words: Sequence[str], inputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None) -> float:
        """Of the held-out digits, those whose word among `words` the model writes."""
        wanted = self.ids(words)[self.held_out.labels]
        written = self.model.generate(inputs, max_len=wanted.shape[1] + 1, vectors=vectors)
        return float(written_exactly(written, wanted).float().mean())

    def base(self) -> dict[str, Tensor]:
        """A copy of every weight that is no hook's."""
        return {name: t.clone() for name, t in self.model.state_dict().items() if not name.startswith("hooks.")}


def shuffled(x: Tensor) -> Tensor:
    """The null: each example with another's."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """1.0 if all tensors are, bit by bit, else 0.0."""
    return float(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))


def language(lesson: Lesson, tokens: int = 0, out: Path | None = None) -> Figures:
    """A new task: the voice says letters that the model never wrote. Tokens and it have a hundredth of the parameters."""
    model, pictures = lesson.model, {"image": lesson.held_out.images}

    def answers() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model.text_logits(model.read(pictures), lesson.ids(WORDS)[lesson.held_out.labels])}

    before, said = lesson.base(), answers()
    figures = {"before: English": lesson.share(WORDS, pictures), "before: German": lesson.share(GERMAN, pictures)}
    dim, every = model.config.hidden_dim, sum(p.numel() for p in model.parameters())
    room = (every // 100 - model.config.num_layers - 1) // dim  # a token takes one, the voice two for each of its width
    if room < 2:
        raise UserError(f"a hundredth of this model's {every:,} parameters has no room for a voice: give a larger model.")
    if tokens < 0 or room - tokens < 2:
        raise UserError(f"--tokens {tokens}: a hundredth of this model's {every:,} parameters has room for 0 to {room - 2} beside "
                        "a voice.")
    hook = lesson.hook("german", tokens, min(WIDEST, (room - tokens) // 2))
    figures["share of the parameters"] = sum(p.numel() for p in hook.parameters()) / every
    lesson.teach(hook.parameters(), GERMAN, lambda batch: {"inputs": {"image": batch.images}})
    figures |= {"with the hook: German": lesson.share(GERMAN, pictures), "with the hook: English": lesson.share(WORDS, pictures)}
    if out is not None:
        hook.save(out)
    model.remove_hook("german")
    figures |= {"removed: English": lesson.share(WORDS, pictures), "removed: German": lesson.share(GERMAN, pictures)}
    return figures | {"weights as before": same(before, lesson.base()), "answers as before": same(said, answers())}


def knowledge(lesson: Lesson) -> Figures:
    """Knowledge at call time: of a digit only the upper half is seen, and told from elsewhere whether it is even."""
    model, held_out, count = lesson.model, lesson.held_out, 4
    dim, device = model.config.hidden_dim, held_out.images.device

    def hidden(pictures: Pictures) -> dict[str, Tensor]:
        images = pictures.images.clone()
        images[:, :, images.shape[2] // 2 :] = 0
        return {"image": images}

    def told(facts: Tensor) -> dict[str, Tensor]:
        return {"facts": told_by(facts).unflatten(1, (count, dim))}

    def facts(labels: Tensor) -> Tensor:
        return one_hot(labels % 2, 2).float()

    def example(batch: Pictures) -> dict:
        known = facts(batch.labels)
        known[: len(known) // 4] = 0  # a quarter learns without the fact
        return {"inputs": hidden(batch), "vectors": told(known)}

    before, seen = lesson.base(), hidden(held_out)
    figures = {"without the hook": lesson.share(WORDS, seen)}
    hook = lesson.hook("facts", 0, 16)
    told_by = nn.Linear(2, count * dim).to(device)
    lesson.teach([*hook.parameters(), *told_by.parameters()], WORDS, example)
    right = facts(held_out.labels)
    for name, given in (("told nothing", 0 * right), ("told the fact", right), ("told another digit's fact", shuffled(right))):
        figures[name] = lesson.share(WORDS, seen, told(given))
    model.remove_hook("facts")
    return figures | {"weights as before": same(before, lesson.base())}


def inspect(lesson: Lesson) -> Figures:
    """Interpretability: digits told by a linear probe from states after each layer. The hook's gates are closed: it reads the
    content with the layers' own weights, and nothing is changed by it."""
    learned, held_out, model = lesson.learned, lesson.held_out, lesson.model
    lesson.hook("reader", 8, 0, gate_bias_init=-1e4)

    def probed(pictures: Pictures, layer: int) -> dict[str, Tensor]:
        return {name: states.mean(1) for name, states in model.probe(layer, "image", pictures.images).items()}

    ink, asked_ink = (pictures.images[:, 0].flatten(1) for pictures in (learned, held_out))
    figures = {"pixels": read_off(ink, learned.labels, asked_ink, held_out.labels)}
    for layer in range(model.config.num_layers):
        states, asked = probed(learned, layer), probed(held_out, layer)
        for name in states:
            figures[f"layer {layer}: {name}"] = read_off(states[name], learned.labels, asked[name], held_out.labels)
    figures["null: shuffled labels"] = read_off(states["content"], shuffled(learned.labels), asked["content"], held_out.labels)
    model.remove_hook("reader")
    return figures


def read_off(x: Tensor, labels: Tensor, asked: Tensor, wanted: Tensor, ridge: float = 1e-3) -> float:
    """The share of `asked` `(m, d)` that a ridge regression from `x` `(n, d)` to ten indicators names as `wanted` `(m,)`."""
    x, labels, asked, wanted = (t.cpu() for t in (x, labels, asked, wanted))
    standard = Standardised(x)
    x, asked = (nn.functional.pad(standard(t), (0, 1), value=1.0).double() for t in (x, asked))
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]).to(x), x.T @ one_hot(labels, 10).to(x))
    return float(((asked @ weights).argmax(1) == wanted).float().mean())


def modality(lesson: Lesson) -> Figures:
    """A new modality: what a hand feels of a digit, as 16 sums over rows and columns. The source itself is a blank."""
    model, held_out, count = lesson.model, lesson.held_out, 4
    dim, device = model.config.hidden_dim, held_out.images.device

    def touch(pictures: Pictures) -> Tensor:
        ink = pictures.images[:, 0]
        return torch.cat([ink.mean(axis).unflatten(1, (8, -1)).mean(2) for axis in (1, 2)], 1)

    def felt(touched: Tensor) -> dict:
        blank = torch.tensor([model.tokenizer.encode(" ")], device=device).expand(len(touched), -1)
        return {"inputs": {"text": blank}, "vectors": {"touch": encoder(touched).unflatten(1, (count, dim))}}

    before, mine = lesson.base(), touch(held_out)
    hook = lesson.hook("touch", 0, 16)
    first = touch(lesson.learned)
    encoder = nn.Sequential(Standardised(first), nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, count * dim)).to(device)
    lesson.teach([*hook.parameters(), *encoder.parameters()], WORDS, lambda batch: felt(touch(batch)))
    touches = {"by touch": mine, "another digit's touch": shuffled(mine)}
    figures = {name: lesson.share(WORDS, **felt(given)) for name, given in touches.items()}
    figures["a linear probe of the same numbers"] = read_off(first, lesson.learned.labels, mine, held_out.labels)
    model.remove_hook("touch")
    return figures | {"weights as before": same(before, lesson.base())}


class Standardised(nn.Module):
    """`(b, d)` less the mean of `x` `(n, d)`, over its standard deviation."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


USES: dict[str, Callable[[Lesson], Figures]] = {"language": language, "knowledge": knowledge, "inspect": inspect,
                                                "modality": modality}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("use", choices=USES)
    parser.add_argument("--model", required=True, help="a run of an omni recipe")
    parser.add_argument("--data", default=EMBEDDED, help="'digits', or a folder with mnist/")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--tokens", type=int, default=0, help="language: tokens of the hook beside its voice")
    parser.add_argument("--out", type=Path, help="language: a new folder for the hook")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        if options.steps < 1:
            raise UserError(f"--steps is at least 1; got {options.steps}.")
        if options.out is not None and options.out.exists():
            raise UserError(f"--out {options.out} is there already: give a new folder.")
        lesson = Lesson.open(options.model, options.data, options.steps, options.device)
        use = partial(language, tokens=options.tokens, out=options.out) if options.use == "language" else USES[options.use]
        for name, figure in use(lesson).items():
            print(f"{name:<36} {figure:8.2%}" if "as before" not in name else f"{name:<36} {'yes' if figure else 'NO':>8}")
    except UserError as mistake:
        print(f"hooks.py: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
