"""How many images a second a codec encodes and decodes.

- `measure_speed`: the median of repeated calls after a warm-up, within a time limit.
- `Speed`: the figures and what they were measured on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..codec import Codec

BUDGET = 6.0  # seconds for the timed calls; a first call always happens


@dataclass(frozen=True)
class Speed:
    """Images a second, with the batch and size that they hold for."""

    encode_ips: float
    decode_ips: float
    batch_size: int
    size: int
    repeats: int

    def conditions(self) -> str:
        """In words, for the note of a figure."""
        times = "1 timed call" if self.repeats == 1 else f"median of {self.repeats} calls"
        return f"{self.size}×{self.size}, batch {self.batch_size}, {times}"


def measure_speed(
    codec: Codec, size: int = 256, batch_size: int = 8, repeats: int = 10, budget: float = BUDGET
) -> Speed:
    """Time `codec.encode` and `codec.decode` on noise, where the codec is and in its dtype.

    A call that encodes and decodes one image comes first, as a warm-up. Where a batch would not fit into `budget`
    four times over, the batch is made smaller, down to 1 (large models on a CPU take seconds an image); `Speed` says
    what was used. On a GPU every call ends with a synchronisation, so that the work is timed and not its launch.

    Args:
        size: the side of the square images.
        batch_size: images a call, if time allows.
        repeats: timed calls, if time allows; at least 1.
        budget: seconds for the timed calls.
    """
    device = codec.device
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> torch.Tensor:
        return torch.rand(count, codec.spec.image_channels, size, size, generator=generator).to(device, codec.dtype)

    one = images(1)
    cost = _timed(lambda: codec.decode(codec.encode(one)), device)
    if cost < budget / 4:  # the very first call also sets things up; ask again where that is cheap
        cost = _timed(lambda: codec.decode(codec.encode(one)), device)
    batch_size = max(1, min(batch_size, int(budget / (4 * max(cost, 1e-9)))))
    batch = images(batch_size)
    latent = codec.encode(batch)
    if batch_size > 1:  # a new shape: kernels are chosen and memory is taken again
        codec.decode(latent)
    encode, decode = [], []
    deadline = time.perf_counter() + budget
    while len(encode) < max(1, repeats):
        encode.append(_timed(lambda: codec.encode(batch), device))
        decode.append(_timed(lambda: codec.decode(latent), device))
        if time.perf_counter() > deadline:
            break
    return Speed(batch_size / statistics.median(encode), batch_size / statistics.median(decode), batch_size, size,
                 len(encode))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes, its work on the device included."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return max(time.perf_counter() - start, 1e-9)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
