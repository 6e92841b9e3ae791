"""What organic models are learned from: linear neurons from moments, tuned hidden ones, and stacks, a layer a round.

Oracles are made outside of the mode in which gradients and solvers raise.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from clones import forward_only
from test_organic_learner import assert_equal, optimum, pairs, together
from torch import Tensor

from omnilatent.errors import UserError
from omnilatent.organic import tuning
from omnilatent.organic.dropin_learning import DecoderLearning
from omnilatent.organic.grid_learning import GridConfig, LayerSearch, StackLearning
from omnilatent.organic.grids import GridDecoder, GridStack, frequencies
from omnilatent.organic.learning import Gathered, Pace
from omnilatent.organic.lessons import Lessons
from omnilatent.organic.neurons import Neurons, squared_errors
from omnilatent.organic.pairs import Affine, draw_pairs
from omnilatent.organic.peers import ALONE, Peers
from omnilatent.organic.probes import fit_linear
from omnilatent.organic.regression import Regression, fit_moments, fit_readout, forward_selection
from omnilatent.organic.tuning import Rows, Tuning, read_out

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def seen(inputs: Tensor, targets: Tensor, *splits: int) -> Regression:
    """Their moments, added in parts of the given lengths."""
    found = Regression(inputs.shape[1], targets.shape[1])
    for x, y in zip(inputs.split(list(splits) or len(inputs)), targets.split(list(splits) or len(inputs)), strict=True):
        found.add(x, y)
    return found


def test_equal_inputs_make_no_neurons() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 12, generator=draw), torch.randn(1000, 3, generator=draw)
    x[::2] = x[0]  # half of the patches are the same white wall, whatever their pictures' targets
    drawn = draw_pairs(x, y, 200, torch.Generator().manual_seed(1), whitening=(0.0, 0.5))
    assert drawn.weight.norm(dim=1).min() > 0.1
    nothing = draw_pairs(torch.zeros(20, 12), y[:20], 5, draw, whitening=(0.0,))  # and where all are equal none is any use
    assert nothing.weight.isfinite().all() and not nothing.weight.any()


def test_the_check_refuses_a_gradient_and_a_solver() -> None:
    with forward_only():
        for call in (lambda: torch.ones(1, requires_grad=True).sum().backward(), lambda: torch.eye(2).inverse(),
                     lambda: torch.linalg.solve(torch.eye(2), torch.ones(2)), lambda: np.linalg.pinv(np.eye(2)),
                     lambda: torch.autograd.grad(torch.ones(1, requires_grad=True).sum(), [])):
            with pytest.raises(AssertionError, match="was called"):
                call()
    assert torch.equal(torch.linalg.solve(torch.eye(2), torch.ones(2)), torch.ones(2))


# ---------------------------------------------------------------------------------------------------------------
# Linear neurons


@pytest.mark.parametrize("splits", [(1, 699, 1300), (500,) * 4, (3,) * 10 + (1970,)])
def test_moments_of_any_split_give_the_same_neurons(splits: tuple[int, ...]) -> None:
    inputs, targets = pairs()
    whole, parts = fit_moments(seen(inputs, targets)), fit_moments(seen(inputs, targets, *splits))
    assert torch.allclose(whole(inputs), parts(inputs), atol=1e-4) and whole(inputs).std() > 0.5

    def work(peers: Peers) -> Neurons:
        return fit_moments(seen(inputs[peers.rank :: 3], targets[peers.rank :: 3]).over(peers))

    many = together(3, work)
    assert torch.allclose(many[0](inputs), whole(inputs), atol=1e-4)
    assert all(torch.equal(neurons.weight, many[0].weight) for neurons in many)


def test_losses_are_those_of_a_forward_evaluation() -> None:
    inputs, targets = pairs(rows=900)
    targets = targets + 30  # far from 0, where moments cancel
    draw = torch.Generator().manual_seed(3)
    neurons = Neurons(torch.randn(3, 40, generator=draw), 30 + torch.randn(3, generator=draw))
    found = seen(inputs, targets, 200, 700).losses(neurons.weight, neurons.bias)
    assert torch.allclose(found, squared_errors(neurons, inputs, targets), rtol=1e-5)


def test_neurons_from_moments_are_least_squares() -> None:
    inputs, targets = pairs()
    best = optimum(inputs, targets)
    with forward_only():
        neurons = fit_moments(seen(inputs, targets))
        rival, _ = fit_linear(inputs, targets, sweeps=2)
    assert float(squared_errors(neurons, inputs, targets).mean()) / best - 1 < 1e-5
    assert torch.allclose(neurons(inputs), rival(inputs), atol=1e-3)
    z, y = (inputs - inputs.mean(0)) / inputs.std(0, correction=0), targets - targets.mean(0)
    ridge = np.linalg.solve((z.mT @ z / 2000 + 0.3 * torch.eye(40)).double().numpy(), (z.mT @ y / 2000).double().numpy())
    ours = fit_moments(seen(inputs, targets), ridge=0.3).weight * inputs.std(0, correction=0)
    assert torch.allclose(ours.double(), torch.from_numpy(ridge.T), atol=1e-4)


def test_the_ridge_is_the_one_that_held_out_rows_like() -> None:
    inputs, targets = pairs(rows=60, noise=2.0)
    held = pairs(rows=800, noise=2.0)
    ridges = (1e-6, 1e-3, 1e-1, 10.0, 1000.0)
    moments = seen(inputs, targets)
    losses = [float(squared_errors(fit_moments(moments, ridge), *held).mean()) for ridge in ridges]
    neurons, loss = fit_readout(moments, seen(*held), ridges)
    assert 0 < int(np.argmin(losses)) < len(ridges) - 1
    assert loss == pytest.approx(min(losses), rel=1e-4)
    assert torch.equal(neurons.weight, fit_moments(moments, ridges[int(np.argmin(losses))]).weight)
    with pytest.raises(UserError, match="No ridge gives a finite held-out loss"):
        fit_readout(moments, seen(held[0], held[1] * math.nan))


def test_some_inputs_moments_and_a_saved_regression_are_the_same() -> None:
    inputs, targets = pairs(rows=500)
    which, whole = torch.tensor([7, 0, 31]), seen(inputs, targets)
    some = fit_moments(whole.part(which))
    assert torch.allclose(some(inputs[:, which]), fit_moments(seen(inputs[:, which], targets))(inputs[:, which]), atol=1e-5)
    again = Regression(40, 3)
    again.load_state(saved(whole.state()))
    again.add(inputs, targets)
    whole.add(inputs, targets)
    assert_equal(again.state(), whole.state())


def saved(state: object) -> object:
    """As it comes back from a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_forward_selection_finds_what_the_targets_are_made_of() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 30, generator=draw)
    features[:, 9] = features[:, 4] + 0.01 * torch.randn(400, generator=draw)  # a copy adds nothing
    targets = features[:, [4, 17]] @ torch.tensor([[2.0, 0.0], [1.0, 1.5]]) + 0.3 * features[:, 2:3]
    with forward_only():
        moments = seen(features, targets)
        assert set(forward_selection(moments, 3).tolist()) in ({4, 17, 2}, {9, 17, 2})
        assert forward_selection(moments, 1, forced=5).tolist() == [17]  # 4 is given, so 9, its copy, adds nothing
        assert forward_selection(moments, 2, forced=5).min() >= 5
        weighing = torch.tensor([[0.0], [1.0]])  # of the second target alone, which is 1.5 times input 17
        assert forward_selection(moments, 1).item() in (4, 9) and forward_selection(moments, 1, weighing=weighing) == 17


# ---------------------------------------------------------------------------------------------------------------
# Hidden neurons


def student(rows: int = 3000, held: int = 1500, d: int = 8, k: int = 3) -> Rows:
    """Rows of what six tanh neurons say, and a little noise."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(rows + held, d, generator=draw) * torch.linspace(2, 0.3, d) + 0.5
    hidden = torch.tanh(x @ torch.randn(d, 6, generator=draw) + torch.randn(6, generator=draw))
    y = hidden @ torch.randn(6, k, generator=draw) + 0.02 * torch.randn(rows + held, k, generator=draw)
    return Rows(x[:rows], y[:rows], x[rows:], y[rows:])


CONFIG = GridConfig(neurons=8, candidates=64, ridges=(1e-9,))


def tuned(rows: Rows, steps: int, weighing: Tensor | None = None, peers: Peers = ALONE) -> Tuning:
    """Steps from neurons that are the same for any share of the rows."""
    draw = torch.Generator().manual_seed(1)
    hidden = Affine(0.5 * torch.randn(8, rows.x.shape[1], generator=draw), torch.randn(8, generator=draw))
    axes = read_out(rows, None, CONFIG.ridges, peers)[2].inputs.axes()
    search = Tuning(rows, hidden, axes, CONFIG.ridges, weighing, peers)
    for _ in range(steps):
        search.step()
    return search


def said(hidden: Affine, readout: Neurons, x: Tensor) -> Tensor:
    return readout(torch.cat([x, hidden(x)], 1))


def test_the_responses_are_how_the_loss_falls() -> None:
    rows, weighing = student(600), torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.0]])
    search = tuned(rows, 2, weighing)
    response, _, loss = search._responses(rows, len(rows.x))
    weight, bias = search.hidden.weight.requires_grad_(), search.hidden.bias.requires_grad_()
    mean = rows.x.double().mean(0).float()
    sums = (rows.x - mean) @ weight.mT + (bias + weight @ mean)
    error = (rows.y - search.readout(torch.cat([rows.x, torch.tanh(sums)], 1))) @ weighing
    assert float(error.detach().square().mean()) == pytest.approx(loss, rel=1e-5)
    about_mean = torch.autograd.grad(error.square().mean(), [sums])[0]
    gradient = torch.cat([about_mean.mT @ (rows.x - mean), about_mean.sum(0)[:, None]], 1)
    assert torch.allclose(-gradient * error.shape[1] / 2, response, atol=2e-3 * float(response.abs().max()))


@pytest.mark.parametrize("weighing", [None, torch.tensor([[1.0], [0.2], [-1.0]])])
def test_no_step_raises_the_loss_that_it_states(weighing: Tensor | None) -> None:
    rows, before = student(), math.inf
    with forward_only():
        search = tuned(rows, 0, weighing)
        for _ in range(20):
            hidden, readout = search.hidden, search.readout
            search.step()
            error = said(search.hidden, readout, rows.x) - rows.y
            stayed = said(hidden, readout, rows.x) - rows.y
            loss, old = (float((e if weighing is None else e @ weighing).square().mean()) for e in (error, stayed))
            assert search.loss == pytest.approx(loss, rel=1e-4) and loss <= old * (1 + 1e-6)
            assert weighing is not None or search.loss <= before * (1 + 1e-5)  # nor does the readout, fitted to all alike
            before = search.loss
    assert loss < 0.7 * float((tuned(rows, 0, weighing)._responses(rows, len(rows.x)))[2])


def test_a_step_that_leads_too_far_is_not_taken() -> None:
    rows = student(600)
    search = tuned(rows, 1)
    search.length, before = 1e4, search.hidden
    search.step()
    assert search.hidden is before and search.length == 2500
    for _ in range(10):
        search.step()
    assert search.hidden is not before and search.length < 100


def test_what_held_out_rows_like_best_is_handed_out() -> None:
    """Neurons that are fitted to few rows get worse for others, the longer they are tuned."""
    rows = student(60, 800)
    rows = Rows(rows.x, rows.y + torch.randn(60, 3, generator=torch.Generator().manual_seed(1)), rows.held_x, rows.held_y)
    search, losses = tuned(rows, 0), []
    for step in range(31):
        if step % 3 == 0:  # the readout has just been fitted
            losses.append(float((said(search.hidden, search.readout, rows.held_x) - rows.held_y).square().mean()))
        search.step()
    assert losses[-1] > 1.2 * min(losses) and search.lowest == pytest.approx(min(losses), rel=1e-4)
    error = said(*search.best, rows.held_x) - rows.held_y
    assert float(error.square().mean()) == pytest.approx(min(losses), rel=1e-4)


def test_tuned_neurons_do_far_better_on_held_out_rows_than_selected_ones() -> None:
    rows = student()
    with forward_only():
        search = LayerSearch(rows, CONFIG, 0)
        selected = search.held_loss
        for _ in range(60):
            search.step()
    assert search.held_loss < 0.2 * selected < selected < search.mean_loss
    layer = search.layer()
    error = layer(rows.held_x.mT[None])[0].mT - rows.held_y
    assert float(error.square().mean()) == pytest.approx(search.held_loss, rel=1e-4)  # what is handed out is the best
    assert search.tuning.lowest == search.held_loss < search.mean_loss
    assert search.mean_loss == pytest.approx(float((rows.held_y - rows.y.mean(0)).square().mean()), rel=1e-5)


def test_a_layer_of_linear_targets_has_no_neurons() -> None:
    rows, draw = student(200), torch.Generator().manual_seed(0)
    turn = torch.randn(8, 3, generator=draw)
    noise = torch.randn(1700, 3, generator=draw)
    search = LayerSearch(Rows(rows.x, rows.x @ turn + noise[:200], rows.held_x, rows.held_x @ turn + noise[200:]), CONFIG, 0)
    search.step()
    assert search.layer().sizes == (0, 3)


@pytest.mark.parametrize("shares", [1, 4])
def test_two_peers_with_half_of_the_rows_end_where_one_with_all_ends(
    shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = student(1600, 600)
    monkeypatch.setattr(tuning, "_SHARE", 1600 // shares)
    turns = torch.arange(1600).unflatten(0, (shares, 2, -1))  # of each share, one peer's rows and the other's

    def work(peers: Peers) -> Tuning:
        mine = turns[:, peers.rank].flatten()
        return tuned(Rows(rows.x[mine], rows.y[mine], rows.held_x[peers.rank :: 2], rows.held_y[peers.rank :: 2]), 8,
                     peers=peers)

    one, many = tuned(rows, 8), together(2, work)
    assert one.shares == many[0].shares == shares
    assert_equal(plain(many[0].state()), plain(many[1].state()))
    assert many[0].lowest == pytest.approx(one.lowest, rel=1e-3) and one.lowest < 0.8 * tuned(rows, 0).lowest
    assert torch.allclose(many[0].hidden.weight, one.hidden.weight, atol=1e-2)
    alone = tuned(Rows(rows.x[:800], rows.y[:800], rows.held_x, rows.held_y), 8)
    assert not torch.allclose(alone.hidden.weight, one.hidden.weight, atol=1e-2)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_tuning_goes_on_from_its_state(cut: int) -> None:
    rows = student(800, 400)
    whole, again = tuned(rows, 7), tuned(rows, 0)
    again.load_state(saved(tuned(rows, cut).state()))
    for _ in range(7 - cut):
        again.step()
    assert_equal(plain(again.state()), plain(whole.state()))


def plain(state: object) -> object:
    """Lists as dicts, which `assert_equal` looks into."""
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    return {key: plain(value) for key, value in state.items()} if isinstance(state, dict) else state


# ---------------------------------------------------------------------------------------------------------------
# Stacks


class Maps:
    """Lessons whose latents are a code of three channels and a goal of some."""

    def __init__(self, goals: int, noise: bool) -> None:
        draw = torch.Generator().manual_seed(2)
        code = torch.randn(40, 3, 8, 8, generator=draw)
        kernel = torch.randn(goals, 3, 3, 3, generator=draw)
        around = torch.nn.functional.pad(code, (1, 1, 1, 1), mode="replicate")
        goal = torch.nn.functional.conv2d(torch.tanh(2 * around), kernel)
        goal = torch.randn(goal.shape, generator=draw) if noise else goal
        self.all = Lessons(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.cat([code, goal], 1))

    def teach(self, learning: StackLearning, sweeps: int = 6) -> StackLearning:
        """All rounds, a quarter of the lessons held out."""
        for _ in range(learning.rounds):
            for position in range(4):
                part = slice(10 * position, 10 * position + 10)
                learning.see(Lessons(self.all.pictures[part], self.all.latents[part]), position == 3, position)
            for sweep in range(sweeps):
                learning.work(sweep + 1 == sweeps)
        return learning


def stack_learning(context: int, layers: int = 2, adds: bool = False, reach: int = 1) -> StackLearning:
    config = GridConfig(layers=layers, neurons=12, candidates=48, reach=reach, context=context)
    stack = GridStack(3, [], reach, context, adds)
    return StackLearning(stack, lambda lessons: lessons.taught[:, :3], lambda lessons: lessons.taught[:, 3:], config,
                         Pace(30, 10, 6000, 0), ALONE, CPU)  # all sites


def test_a_stack_that_cannot_learn_keeps_no_layer() -> None:
    with forward_only():
        learning = Maps(2, noise=True).teach(stack_learning(2, reach=5))
    assert learning.over and learning.model() is None and learning.left == 1 and learning.round == 2
    learning.see(Maps(2, noise=True).all, False, 0)
    assert learning.gathered.parts == {False: [], True: []}  # nothing more is gathered


@pytest.mark.parametrize("adds", [False, True])
def test_a_stack_keeps_layers_as_long_as_the_held_out_loss_falls(adds: bool) -> None:
    maps = Maps(2, noise=False)
    with forward_only():
        learning = maps.teach(stack_learning(2, layers=3, adds=adds))
    losses = learning.losses
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)) and len(losses) > 2
    assert learning.left == losses[-1] / losses[0] < 0.6
    held = maps.all.taught[30:]
    error = (learning.model()(held[:, :3]) - held[:, 3:]).square().mean()
    assert float(error) == pytest.approx(losses[-1], rel=1e-3)


def test_a_slim_stack_says_what_the_full_one_says() -> None:
    learning = Maps(5, noise=False).teach(stack_learning(2))
    slim, code = learning.model(), torch.randn(2, 3, 7, 9)
    assert [layer.sizes[1] for layer in learning.stack.layers] == [5, 5]
    assert [layer.sizes[1] for layer in slim.layers] == [2, 5]
    assert torch.allclose(slim(code), learning.stack(code), atol=1e-5)
    adding = Maps(5, noise=False).teach(stack_learning(2, adds=True)).model()
    assert [layer.sizes[1] for layer in adding.layers] == [5, 5]  # all of it is added
    first = GridStack(3, [], 1, 2)
    first.layers.append(adding.layers[0])
    guess = first(code)
    assert torch.allclose(adding(code), guess + adding.layers[1](adding.inputs(code, guess)).unflatten(2, (7, 9)), atol=1e-5)


def test_a_stack_goes_on_from_its_state() -> None:
    maps, learning = Maps(2, noise=False), stack_learning(2)
    part = Lessons(maps.all.pictures[:30], maps.all.latents[:30]), Lessons(maps.all.pictures[30:], maps.all.latents[30:])

    def step(learning: StackLearning, number: int) -> None:
        if number % 6 < 2:
            learning.see(part[number % 6], number % 6 == 1, number % 6)
        else:
            learning.work(number % 6 == 5)

    states = []
    for number in range(12):
        step(learning, number)
        states.append(saved(learning.state()))
    for cut in range(11):
        again = stack_learning(2)
        again.load_state(states[cut])
        for number in range(cut + 1, 12):
            step(again, number)
        assert_equal(plain(saved(again.state())), plain(states[-1]))
        assert again.left == learning.left and again.done == 0


def test_the_rows_of_a_round_are_a_share_of_every_batch() -> None:
    gathered = Gathered(Pace(photos=100, held=20, sites=1000, seed=0))
    x = torch.arange(10 * 64.0).view(10, 1, 64)
    for position in range(10):
        gathered.take(x, x, False, position)
    gathered.take(x, x, True, 0)
    rows = gathered.rows()
    assert len(rows.x) == 1000 and len(rows.held_x) == 62  # an eighth of it a round, 20 pictures
    assert torch.equal(rows.x, rows.y) and len(rows.x.unique()) > 400  # other sites of every batch
    again = Gathered(gathered.pace)
    again.load_state(saved(gathered.state()), CPU)
    assert torch.equal(again.rows().x, rows.x)
    empty = Gathered(gathered.pace)
    empty.take(x, x, False, 0)
    with pytest.raises(UserError, match="no held-out pictures for one of the processes"):
        empty.rows()


def test_cosines_are_orthonormal_and_the_brightness_comes_first() -> None:
    waves = frequencies(8)
    assert torch.allclose(waves @ waves.mT, torch.eye(192), atol=1e-5)
    assert torch.allclose(waves[0], torch.full((192,), 192**-0.5))


def test_a_decoder_of_more_layers_goes_on_where_the_last_one_ended() -> None:
    """A grid decoder says pixels; its learning fits their cosines."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 4, 4, 4, generator=draw)
    patterns = torch.randn(4, 3, 8, 8, generator=draw)
    pictures = torch.einsum("bchw,cpij->bphiwj", torch.tanh(latents), patterns).reshape(40, 3, 32, 32) * 20 + 128
    lessons = Lessons(pictures.clamp(0, 255).round().byte(), latents)
    maps = Maps(2, noise=False)
    maps.all = lessons
    learning = DecoderLearning(lambda lessons: lessons.taught, 4, 8, GridConfig(2, 8, 32, context=4), Pace(30, 10, 2000, 0),
                               ALONE, CPU)
    with forward_only():
        model = maps.teach(learning).model()
    assert isinstance(model, GridDecoder)
    held = Lessons(lessons.pictures[30:], latents[30:])
    error = (model(held.taught) - held.images).square().mean()
    assert float(error) == pytest.approx(learning.losses[-1], rel=1e-3)  # cosines keep the errors' squares
    assert float(error) < 0.2 * float(held.images.var())
    with pytest.raises(ValueError, match=r"latents have shape \(b, 4, h, w\); got \(1, 5, 2, 2\)"):
        model(torch.zeros(1, 5, 2, 2))
