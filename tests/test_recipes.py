"""Claims about --recipe: what the paper and its repository set, and that every other option still overrides."""

import math

import pytest
import torch

from training import distill, train_denoiser
from training.loop.distance import mse_distance, norm_distance
from training.loop.distributed import Processes
from training.loop.optimisation import make_adamw
from training.loop.options import training_settings
from training.loop.settings import TrainingSettings

STAGES = {
    train_denoiser: ["--pairs", "p", "--model", "m", "--out", "o"],
    distill: ["--images", "i", "--model", "m", "--out", "o"],
}


def parsed(command, *options):
    argv = [*STAGES[command], *options]
    return command.make_parser(argv).parse_args(argv)


def settings(command, *options, samples=10_000, processes=1):
    args = parsed(command, *options)
    return training_settings(args, samples, "here", Processes(0, processes))


def test_ours_is_the_paper_s_ten_epochs_at_64():
    ours = settings(train_denoiser, "--val-fraction", "0")
    assert (ours["steps"], ours["batch_size"], ours["lr"], ours["min_lr"], ours["warmup"]) == (1563, 64, 2e-4, 0, 0)
    assert parsed(train_denoiser).start == "static" and parsed(train_denoiser, "--recipe", "paper").start == "random"


def test_the_repository_s_stage_2():
    theirs = settings(train_denoiser, "--recipe", "repository")
    # main_denoiser.py and sample_scripts/stage2.sh: 8 x 16, sqrt scaling, int(0.15 * iterations), min_lr
    assert (theirs["steps"], theirs["batch_size"], theirs["warmup"]) == (50_000, 128, 7_500)
    assert theirs["lr"] == pytest.approx(2e-4 * math.sqrt(128 / 256)) and theirs["min_lr"] == 1e-6
    assert (theirs["weight_decay"], theirs["decay_all"], theirs["loss"]) == (1e-5, True, "mse")


def test_the_repository_s_stage_3():
    args = parsed(distill, "--recipe", "repository")
    theirs = settings(distill, "--recipe", "repository", "--val-fraction", "0", samples=51_200)
    assert (theirs["steps"], theirs["batch_size"], theirs["warmup"]) == (500, 512, 75)
    assert theirs["lr"] == pytest.approx(2e-4 * math.sqrt(2)) and theirs["loss"] == "mse"
    assert (args.augment, args.tokens) == ("flip", "patches")


def test_a_recipe_s_batch_is_that_of_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parsed(train_denoiser, "--recipe", "repository").batch_size == 16
    assert settings(train_denoiser, "--recipe", "repository", processes=8)["batch_size"] == 128


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--epochs", "2", "--val-fraction", "0"), {"steps": 157}),
        (("--lr", "0.5"), {"lr": 0.5, "loss": "mse"}),
        (("--base-lr", "0.5", "--batch-size", "64"), {"lr": 0.25}),
        (("--warmup", "7"), {"warmup": 7, "steps": 50_000}),
        (("--warmup", "10%", "--steps", "40"), {"warmup": 4, "steps": 40}),
        (("--no-decay-all", "--loss", "norm"), {"decay_all": False, "loss": "norm"}),
    ],
)
def test_every_option_overrides_a_recipe_on_either_side_of_it(options, expected):
    for line in (("--recipe", "repository", *options), (*options, "--recipe", "repository")):
        found = settings(train_denoiser, *line)
        assert {name: found[name] for name in expected} == expected


def test_the_distances_are_those_that_paper_and_repository_write():
    torch.manual_seed(1)
    a, b = torch.randn(2, 5, 8, dtype=torch.float64)
    cosine = torch.stack([x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b)])
    squares = torch.stack([((x - y) ** 2).sum() for x, y in zip(a, b)])
    torch.testing.assert_close(norm_distance(a, b).double(), 1 - cosine + squares.sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mse_distance(a, b).double(), 1 - cosine + squares / 8, rtol=1e-5, atol=1e-5)


def test_decay_reaches_matrices_alone_or_everything():
    block = torch.nn.TransformerEncoderLayer(8, 2)
    for everything, decayed in ((False, {2}), (True, {1, 2})):
        groups = make_adamw(block, 1e-3, 0.1, everything).param_groups
        assert {p.ndim for group in groups if group["weight_decay"] for p in group["params"]} == decayed
        assert sum(len(group["params"]) for group in groups) == len(list(block.parameters()))


@pytest.mark.parametrize(
    "given", [{"loss": "huber"}, {"dtype": "float8"}, {"min_lr": 1.0}, {"batch_size": 0}, {"weight_decay": -1.0},
              {"val_fraction": 1.0}],
)
def test_settings_that_cannot_be_name_themselves(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        TrainingSettings(**given)
