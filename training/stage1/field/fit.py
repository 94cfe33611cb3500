"""Stage 1 as the paper has it (4.2): one image's semantics field F, artifact field G and residual h, trained."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dvt.errors import UserError
from timm_dvt.options import option
from training.loop.optimization import set_learning_rate
from training.loop.schedule import Schedule, straight
from training.stage1.field.backends import make_encoding
from training.stage1.field.hashgrid import HashGridSettings
from training.stage1.field.losses import distance_loss, reconstruction_loss

REPORT_EVERY = 50  # steps


@dataclass(frozen=True)
class FieldSettings:
    """Settings of the neural-field solver; the defaults are the paper's (A.1).

    Half of the steps train F and G, the other half F and h. batch: patches a step. lr: Adam's first
    learning rate. alpha, beta: weights of Eq. 6. backend: "auto", "torch" or "tinycudann". recipe: "paper", or
    "repository" for what the published code does otherwise (training/common/recipes.py, stage 1).
    """

    steps: int = option(
        20_000,
        "steps of the field (default: the paper's %(default)s)",
        "--field-steps",
        dest="field_steps",
        least=2,
        metavar="N",
    )
    batch: int = 2048
    lr: float = 0.01
    alpha: float = 0.1
    beta: float = 0.02
    grid: HashGridSettings = field(default_factory=HashGridSettings)
    backend: str = "auto"
    recipe: str = "paper"

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "repository"):
            raise UserError(f"recipe must be paper or repository, got {self.recipe!r}")
        for name, least in (("steps", 2), ("batch", 1), ("lr", 0), ("alpha", 0), ("beta", 0)):
            if not getattr(self, name) >= least:  # nor NaN
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Networks(nn.Module):
    """F, G and h of one image (Eq. 10), C channels.

    F is a hash grid and Linear(C/2)-ReLU-Linear(C) on x and y in [0, 1] of the whole image, G a learnable map of a
    view's patches (K * K, C) that starts at zero, h a 3-layer MLP of hidden width C/4.
    """

    def __init__(self, channels: int, patches: int, settings: FieldSettings, device: torch.device) -> None:
        super().__init__()
        self.encoding = make_encoding(settings.grid, settings.backend, device)
        self.mlp = _mlp(settings.grid.width, channels // 2, channels).to(device)
        self.residual = _mlp(channels, channels // 4, channels // 4, channels).to(device)
        if settings.recipe == "repository":
            self.artifacts = nn.Parameter((0.02 * torch.randn(patches, channels)).to(device))
            return
        self.artifacts = nn.Parameter(torch.zeros(patches, channels, device=device))
        # Delta starts at zero, its sparsest: from random values on, the pull of Eq. 8's 1-norm, the same in
        # every channel, would switch all hidden units off in the first steps, for good.
        for parameter in self.residual[-1].parameters():
            nn.init.zeros_(parameter)

    def semantics(self, coords: Tensor) -> Tensor:
        """F at coords (B, 2): (B, C)."""
        return self.mlp(self.encoding(coords))


@dataclass
class FieldResult:
    """A trained decomposition of one image: y = F(coords) + G(patch) + h(y) (Eq. 5), G with zero mean.

    artifacts: G (K, K, C). losses: the loss of each step (steps,).
    """

    networks: Networks
    artifacts: Tensor
    losses: Tensor

    @torch.no_grad()
    def semantics(self, coords: Tensor) -> Tensor:
        """F at coords (..., 2), x and y in [0, 1] of the whole image: (..., C)."""
        return self.networks.semantics(coords.reshape(-1, 2).to(self.artifacts)).view(*coords.shape[:-1], -1)

    @torch.no_grad()
    def residual(self, features: Tensor) -> Tensor:
        """h of raw features y (..., C): (..., C)."""
        return self.networks.residual(features.to(self.artifacts))


def fit_field(
    coords: Tensor,
    patches: Tensor,
    features: Tensor,
    grid: int,
    settings: FieldSettings | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> FieldResult:
    """Trains F, G and h on the patch features of one image's views (paper 4.2, Eqs. 5 to 10).

    coords: (P, 2), a patch's center as x and y in [0, 1] of the whole image. patches: (P,) int64, its place
    in the view's patch grid, row by row. features: (P, C) raw features y; they may stay on another device
    than `device` and in half precision. grid: K, patches a side of a view. progress: called with the number of steps
    done since the last call (tqdm's `update` fits).

    The first half of the steps trains F and G on L_distance; the second freezes G and trains F and h on
    L_recon. Each takes a batch of patches at random. Adam, its learning rate falling linearly to zero over all
    steps. With the paper's norms h is sparse: zero but for channels that hold more than beta / alpha of a
    patch's unexplained norm, such as those of outlier tokens.

    The same seed gives the same result on the same CPU and thread count. F and G are only determined up to a
    constant: G is given zero mean, F the rest. Raises FloatingPointError when the loss is no longer finite.
    """
    settings, device = settings or FieldSettings(), torch.device(device)
    coords, patches = coords.to(device, torch.float32), patches.to(device)
    with torch.random.fork_rng(devices=[]):  # on the CPU: the same start on every device
        torch.manual_seed(seed)
        networks = Networks(features.shape[1], grid**2, settings, device)
    optimizer, schedule = _optimizer(networks, settings, device)
    mean = settings.recipe == "repository"
    generator = torch.Generator(features.device).manual_seed(seed)
    losses = torch.zeros(settings.steps, device=device)
    reported = 0
    for step in range(settings.steps):
        batch = torch.randint(len(features), (settings.batch,), generator=generator, device=features.device)
        y = features[batch].to(device, torch.float32)
        batch = batch.to(device)
        set_learning_rate(optimizer, schedule.rate(step))
        optimizer.zero_grad()  # to None: Adam skips what gets no gradient, h in the first phase, G in the second
        y_hat = networks.semantics(coords[batch]) + F.embedding(patches[batch], networks.artifacts)
        if step < settings.steps // 2:
            loss = distance_loss(y, y_hat, mean)
        else:
            networks.artifacts.requires_grad_(False)
            loss = reconstruction_loss(y, y_hat, networks.residual(y), settings.alpha, settings.beta, mean)
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == settings.steps:
            if not torch.isfinite(losses[reported : step + 1]).all():
                raise FloatingPointError(
                    f"the field's loss is not finite by step {step + 1}: are the features finite? "
                    f"If they are, lower lr ({settings.lr})"
                )
            if progress is not None:
                progress(step + 1 - reported)
            reported = step + 1
    with torch.no_grad():
        constant = networks.artifacts.mean(dim=0)
        networks.artifacts.sub_(constant)
        networks.get_parameter("mlp.2.bias").add_(constant)
    return FieldResult(networks.requires_grad_(False), networks.artifacts.view(grid, grid, -1), losses)


def _optimizer(networks: Networks, settings: FieldSettings, device: torch.device) -> tuple[torch.optim.Adam, Schedule]:
    """Adam and its learning rates: a line to 0 (A.1), or the repository's rise over a tenth and cosine to a tenth."""
    fused = device.type in ("cpu", "cuda")
    if settings.recipe == "paper":
        adam = torch.optim.Adam(networks.parameters(), settings.lr, fused=fused)
        return adam, Schedule(settings.steps, settings.lr, decay=straight)
    adam = torch.optim.Adam(
        networks.parameters(), settings.lr, betas=(0.9, 0.99), eps=1e-15, weight_decay=1e-5, fused=fused
    )
    return adam, Schedule(settings.steps, settings.lr, settings.steps // 10, floor=settings.lr / 10)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with a ReLU after each but the last."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
