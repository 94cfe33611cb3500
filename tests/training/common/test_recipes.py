"""Claims about --recipe: what the paper and its repository set, and that every other option still overrides."""

import math
from dataclasses import asdict, replace

import pytest
import timm
import torch

from timm_dvt.options import build
from training import denoise_images, distill, train_denoiser, visualize
from training.common.views import view_axes
from training.loop.distance import mse_distance, norm_distance
from training.loop.distributed import Processes
from training.loop.optimization import make_adamw
from training.loop.settings import TrainingSettings
from training.stage1 import decompose as stage1
from training.stage1.decompose import Stage1Settings, decompose
from training.stage1.field.losses import distance_loss, reconstruction_loss
from training.stage1.images import STAGE1
from training.stage2.train import STAGE2
from training.stage3.train import STAGE3

STAGES = {
    train_denoiser: ["--pairs", "p", "--model", "m", "--out", "o"],
    denoise_images: ["--images", "i", "--model", "m", "--out", "o"],
    distill: ["--images", "i", "--model", "m", "--out", "o"],
}


def parsed(command, *options):
    argv = [*STAGES[command], *options]
    return command.make_parser(argv).parse_args(argv)


def settings(command, *options, samples=10_000, processes=1):
    args = parsed(command, *options)
    recipe = {train_denoiser: STAGE2, distill: STAGE3}[command][args.recipe]
    return asdict(build(recipe, args).settled(samples, "here", Processes(0, processes)))


def stage1_settings(model, *options):
    args = parsed(denoise_images, *options)
    return build(STAGE1[args.recipe], args).settled(model)


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


def test_the_recipes_of_stage_1():
    model = timm.create_model("test_vit")
    paper, theirs, ours = (
        stage1_settings(model, "--recipe", name, "--input-size", "64") for name in ("paper", "repository", "ours")
    )
    assert (paper.solver, paper.views, paper.field.steps, paper.field.recipe) == ("field", 768, 20_000, "paper")
    assert (theirs.solver, theirs.views) == ("field", 769)
    assert (theirs.field.steps, theirs.field.recipe) == (25_000, "repository")
    assert theirs.corner_aligned and theirs.square_first and not (paper.corner_aligned or paper.square_first)
    assert ours.solver == "linear" and ours == replace(ours, corner_aligned=False, square_first=False)


def test_corner_aligned_places_run_from_edge_to_edge(monkeypatch):
    seen = []
    monkeypatch.setattr(stage1, "view_axes", lambda views, centers: seen.append(centers) or view_axes(views, centers))
    for corner_aligned in (True, False):
        settings = Stage1Settings(views=12, input_size=64, corner_aligned=corner_aligned, square_first=corner_aligned)
        decompose(timm.create_model("test_vit").eval(), torch.rand(3, 70, 90), settings)
    # main_img_denoising.py: torch.linspace over a crop's own extent
    torch.testing.assert_close(seen[0], torch.linspace(0, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(seen[1], (torch.arange(4, dtype=torch.float64) + 0.5) / 4)


def test_the_repository_s_losses_of_stage_1_are_means_over_channels():
    torch.manual_seed(0)
    y, y_hat, delta = torch.randn(3, 6, 10)
    cosine = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(y, y_hat)])
    expected = (1 - cosine.mean()) + ((y - y_hat) ** 2).mean()
    torch.testing.assert_close(distance_loss(y, y_hat, mean=True), expected)
    # offline_denoiser.py: 0.1 * mse of the residual, 0.02 * mean of its absolute values
    whole = y_hat + delta
    cosine = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(y, whole)])
    expected = (1 - cosine.mean()) + ((y - whole) ** 2).mean()
    expected = expected + 0.1 * ((y - y_hat - delta) ** 2).mean() + 0.02 * delta.abs().mean()
    torch.testing.assert_close(reconstruction_loss(y, y_hat, delta, 0.1, 0.02, mean=True), expected)


def test_a_recipe_s_batch_is_that_of_all_processes():
    assert settings(train_denoiser, "--recipe", "repository", processes=8)["batch_size"] == 128
    assert settings(train_denoiser, processes=8)["batch_size"] == 8 * 64


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


@pytest.mark.parametrize("command", [*STAGES, visualize])
@pytest.mark.parametrize("option", ["--rec", "--reci", "--recip", "--rec=", "--recipe="])
def test_an_abbreviated_recipe_brings_its_defaults_too(command, option):
    def defaults(*words):
        argv = [*STAGES.get(command, ["cat.jpg", "--model", "m"]), *words]
        return vars(command.make_parser(argv).parse_args(argv))

    words = [f"{option}repository"] if option.endswith("=") else [option, "repository"]
    assert defaults(*words) == defaults("--recipe", "repository") != defaults()


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
    "given",
    [
        {"loss": "huber"},
        {"dtype": "float8"},
        {"min_lr": 1.0},
        {"batch_size": 0},
        {"weight_decay": -1.0},
        {"val_fraction": 1.0},
    ],
)
def test_settings_that_cannot_be_name_themselves(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        TrainingSettings(**given)


def test_the_view_average_is_an_option_of_stage_1():
    settings = stage1_settings(timm.create_model("test_vit"), "--no-artifacts", "--input-size", "64")
    part = decompose(
        timm.create_model("test_vit").eval(), torch.rand(3, 70, 90), replace(settings, views=12, layers=None)
    )
    assert not settings.linear.artifacts and bool((part.artifacts == 0).all())
