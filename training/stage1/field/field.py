"""Stage 1 as the paper has it: one image's semantics field F, artifact field G and residual h, trained."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from training.stage1.field.backends import grid_trainer
from training.stage1.field.hashgrid import HashGrid, HashGridSettings
from training.stage1.field.losses import distance_loss, reconstruction_loss

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class FieldSettings:
    """Settings of the neural-field solver; the defaults are the paper's (A.1).

    steps: half of them train F and G, the other half F and h. batch: patches a step. lr: Adam's first
    learning rate. alpha, beta: weights of Eq. 6. backend: "auto", "torch" or "tinycudann".

    precision: of the MLPs' matrix products in training, "float32", "bfloat16" (weights, their Adam, the hash
    grid, G and the losses stay in float32), or "auto": bfloat16 on a CPU with matrix units for it (AMX), where
    it makes a product several times faster at the same final error (`python -m training.benchmark
    field_step`), else float32. The paper's own library computes its MLPs in half precision.
    """

    steps: int = 20_000
    batch: int = 2048
    lr: float = 0.01
    alpha: float = 0.1
    beta: float = 0.02
    grid: HashGridSettings = field(default_factory=HashGridSettings)
    backend: str = "auto"
    precision: str = "auto"


@dataclass
class FieldResult:
    """A trained decomposition of one image: y = F(coords) + G(patch) + h(y) (Eq. 5), G with zero mean.

    artifacts: G (Kh, Kw, C). losses: the loss of each step (steps,).
    """

    grid: HashGrid
    mlp: nn.Sequential
    residual_mlp: nn.Sequential
    constant: Tensor
    artifacts: Tensor
    losses: Tensor
    settings: FieldSettings

    @torch.no_grad()
    def semantics(self, coords: Tensor) -> Tensor:
        """F at coords (..., 2), x and y in [0, 1] of the whole image: (..., C)."""
        flat = coords.reshape(-1, 2).to(self.constant.device)
        parts = [self.mlp(self.grid(part)) + self.constant for part in flat.split(1 << 14)]
        return torch.cat(parts).view(*coords.shape[:-1], -1)

    @torch.no_grad()
    def residual(self, features: Tensor) -> Tensor:
        """h of raw features y (..., C): (..., C)."""
        return self.residual_mlp(features.to(self.constant))


class FieldTraining:
    """F, G and h of one image in training: the networks of Eq. 10, their optimisers, one step after another.

    channels: C. positions: patches of a view, Kh * Kw. The arguments are those of `fit_field`, unchecked.
    """

    def __init__(
        self, channels: int, positions: int, settings: FieldSettings, seed: int, device: torch.device
    ) -> None:
        self.settings = settings
        with torch.random.fork_rng(devices=[]):  # on the CPU: the same start on every device
            torch.manual_seed(seed)
            self.grid = HashGrid(settings.grid).to(device)
            self.mlp = _mlp(settings.grid.width, channels // 2, channels).to(device)
            self.residual_mlp = _mlp(channels, channels // 4, channels // 4, channels).to(device)
        # Delta starts at zero, its sparsest: from random values on, the pull of Eq. 8's 1-norm, the same in
        # every channel, would switch all hidden units off in the first steps, for good.
        for parameter in self.residual_mlp[-1].parameters():
            nn.init.zeros_(parameter)
        self.artifacts = nn.Parameter(torch.zeros(positions, channels, device=device))
        self.grid_trainer = grid_trainer(settings.backend, self.grid, settings.steps)
        # Adam skips what has no gradient: h in the first phase, G in the second.
        parameters = [*self.mlp.parameters(), self.artifacts, *self.residual_mlp.parameters()]
        self.optimizer = torch.optim.Adam(parameters, fused=device.type in ("cpu", "cuda"))
        self.autocast = _lower_precision(settings.precision, device)
        self.done = 0

    def step(self, coords: Tensor, patches: Tensor, y: Tensor) -> Tensor:
        """One step on patches at coords (B, 2), of grid places (B,) and features y (B, C): its loss."""
        settings = self.settings
        second_phase = self.done >= settings.steps // 2
        encoded = self.grid_trainer.encode(coords)
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.autocast):
            semantics = self.mlp(encoded)
            residual = self.residual_mlp(y) if second_phase else None
        self.optimizer.zero_grad()
        if residual is None:
            loss = distance_loss(semantics, self.artifacts, patches, y)
            self.artifacts.grad = loss.artifacts
            semantics.backward(loss.semantics)
        else:
            loss = reconstruction_loss(
                semantics, self.artifacts, residual, patches, y, settings.alpha, settings.beta
            )
            torch.autograd.backward((semantics, residual), (loss.semantics, loss.residual))
        learning_rate = settings.lr * (1 - self.done / settings.steps)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.grid_trainer.step(learning_rate)
        self.done += 1
        return loss.value

    def fit(
        self,
        coords: Tensor,
        patches: Tensor,
        features: Tensor,
        seed: int,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """All steps, each on a batch drawn at random: their losses (steps,)."""
        settings, device = self.settings, self.artifacts.device
        coords, patches = coords.to(device), patches.to(device)
        generator = torch.Generator(features.device).manual_seed(seed)
        losses = torch.zeros(settings.steps, device=device)
        reported = 0
        for step in range(settings.steps):
            batch = torch.randint(
                len(features), (settings.batch,), generator=generator, device=features.device
            )
            y = features.index_select(0, batch).to(device, torch.float32)
            batch = batch.to(device)
            losses[step] = self.step(coords[batch], patches[batch], y)
            if (step + 1) % 50 == 0 or step + 1 == settings.steps:
                if not torch.isfinite(losses[reported : step + 1]).all():
                    raise FloatingPointError(
                        f"the field's loss is not finite by step {step + 1}: are the features finite? "
                        f"If they are, lower lr ({settings.lr})"
                    )
                if progress is not None:
                    progress(step + 1 - reported)
                reported = step + 1
        return losses

    def result(self, shape: tuple[int, int], losses: Tensor) -> FieldResult:
        """What has been trained, G as (Kh, Kw, C) with its mean moved into F."""
        grid = self.grid_trainer.finish()
        for module in (grid, self.mlp, self.residual_mlp):
            module.requires_grad_(False)
        artifacts = self.artifacts.detach()
        constant = artifacts.mean(dim=0)
        centred = (artifacts - constant).view(*shape, -1)
        return FieldResult(grid, self.mlp, self.residual_mlp, constant, centred, losses, self.settings)


def fit_field(
    coords: Tensor,
    patches: Tensor,
    features: Tensor,
    grid: int | tuple[int, int],
    settings: FieldSettings | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> FieldResult:
    """Trains F, G and h on the patch features of one image's views (paper 4.2, Eqs. 5 to 10).

    coords: (P, 2), a patch's centre as x and y in [0, 1] of the whole image. patches: (P,) int64, its place
    in the view's patch grid, row by row. features: (P, C) raw features y; they may stay on another device
    than `device` and in half precision. grid: K or (Kh, Kw) patches. progress: called with the number of
    steps done since the last call (tqdm's `update` fits).

    F is a hash grid and Linear(C/2)-ReLU-Linear(C), G a learnable map that starts at zero, h a 3-layer MLP of
    hidden width C/4. The first half of the steps trains F and G on L_distance; the second freezes G and
    trains F and h on L_recon. Each takes a batch of patches at random. Adam, its learning rate falling
    linearly to zero over all steps. Where the published code differs, the paper is followed: Adam's usual
    betas and eps (0.9, 0.999, 1e-8; code: 0.9, 0.99, 1e-15), the 2-norm and 1-norm of a patch (code: means
    over its channels), no warm-up. With the paper's norms h is sparse: zero but for channels that hold more
    than beta / alpha of a patch's unexplained norm, such as those of outlier tokens.

    The same seed gives the same result on the same CPU and thread count. F and G are only determined up to a
    constant: G is given zero mean, F the rest. Raises ValueError for arguments that do not fit together and FloatingPointError when the loss is no longer finite.
    """
    settings = settings or FieldSettings()
    shape = (grid, grid) if isinstance(grid, int) else grid
    _check(coords, patches, features, shape[0] * shape[1], settings)
    training = FieldTraining(features.shape[1], shape[0] * shape[1], settings, seed, torch.device(device))
    losses = training.fit(coords, patches, features, seed, progress)
    return training.result(shape, losses)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with a ReLU after each but the last."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lower_precision(precision: str, device: torch.device) -> bool:
    """Whether the MLPs' products are taken in bfloat16."""
    if precision == "auto":
        return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return precision == "bfloat16"


def _check(
    coords: Tensor, patches: Tensor, features: Tensor, positions: int, settings: FieldSettings
) -> None:
    if features.ndim != 2 or features.shape[0] < 1 or features.shape[1] < 4:
        raise ValueError(f"features must be (P, C) with P >= 1 and C >= 4, got {tuple(features.shape)}")
    count = len(features)
    if coords.shape != (count, 2) or not coords.is_floating_point():
        given = f"{tuple(coords.shape)} {coords.dtype}"
        raise ValueError(f"coords must be ({count}, 2) floats, one a feature, got {given}")
    if not bool(((coords >= 0) & (coords <= 1)).all()):
        raise ValueError("coords must lie in [0, 1] of the whole image")
    if patches.shape != (count,) or patches.dtype != torch.int64:
        raise ValueError(f"patches must be ({count},) int64, got {tuple(patches.shape)} {patches.dtype}")
    if int(patches.min()) < 0 or int(patches.max()) >= positions:
        given = f"{int(patches.min())} to {int(patches.max())}"
        raise ValueError(f"patches must lie in 0 to {positions - 1} for this grid, got {given}")
    for name, least in (("steps", 2), ("batch", 1), ("lr", 0), ("alpha", 0), ("beta", 0)):
        if not getattr(settings, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {settings.precision!r}")
    if settings.grid.dims != 2:
        raise ValueError(f"an image needs a grid of 2 dims, got {settings.grid.dims}")
