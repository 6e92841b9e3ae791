"""Two processes over gloo give one process's gradients, discriminator, adaptive weight and posterior noise included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("gradients")
    script = Path(__file__).with_name("gradients.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a − b| over max |a|, over all parameters."""
    assert a.keys() == b.keys() and a
    largest = max(t.abs().max() for t in a.values())
    return float(max((a[k] - b[k]).abs().max() for k in a) / largest)


@pytest.mark.parametrize("prefix", ["", "regularised-", "tokenizer-"])
@pytest.mark.parametrize("part", ["model", "disc"])
def test_two_processes_give_one_processs_gradients(steps: dict[str, dict], part: str, prefix: str) -> None:
    one, rank0, rank1 = (steps[prefix + name][part] for name in ("one", "rank0", "rank1"))
    assert relative_difference(one, rank0) <= 1e-5
    assert relative_difference(rank0, rank1) == 0
    assert max(t.abs().max() for t in one.values()) > 1e-4
    assert prefix != "regularised-" or relative_difference(one, steps["one"][part]) > 1e-2


def test_the_processes_share_the_batch_and_the_adaptive_weight(steps: dict[str, dict]) -> None:
    assert steps["rank0"]["positions"].tolist() + steps["rank1"]["positions"].tolist() == steps["one"]["positions"].tolist()
    weights = [steps[name]["logged"]["adaptive_weight"] for name in ("one", "rank0", "rank1")]
    assert weights[0] > 0 and weights[1] == weights[2] == pytest.approx(weights[0], rel=1e-5)


@pytest.mark.parametrize("prefix", ["", "regularised-"])
@pytest.mark.parametrize("part", ["model", "disc"])
def test_accumulated_parts_give_the_whole_batchs_gradients(steps: dict[str, dict], part: str, prefix: str) -> None:
    assert relative_difference(steps[f"{prefix}one"][part], steps[f"{prefix}accumulated"][part]) <= 1e-5


def test_accumulated_parts_share_one_adaptive_weight(steps: dict[str, dict]) -> None:
    weights = [steps[name]["logged"]["adaptive_weight"] for name in ("one", "accumulated")]
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
