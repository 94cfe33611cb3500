"""DVT's denoiser in plain tensor arithmetic, from the paper and the checkpoint's keys: what ours must equal."""

import math
import re

import torch
from timm.layers import resample_abs_pos_embed


def denoise(state: dict, tokens: torch.Tensor, grid: tuple[int, int], heads: int) -> torch.Tensor:
    """Patch tokens (B, N, C), final norm applied -> denoised tokens (B, N, C), in the tokens' dtype.

    `state` has the published keys: `pos_embed` and `denoiser.*` of one block, or `denoiser.I.*` of several.
    """
    state = {key: tensor.to(tokens.dtype) for key, tensor in state.items()}
    if "pos_embed" in state:
        tokens = tokens + resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=0)
    several = [int(match[1]) for match in (re.match(r"denoiser\.(\d+)\.", key) for key in state) if match]
    for prefix in [f"denoiser.{i}." for i in range(max(several) + 1)] if several else ["denoiser."]:
        tokens = _block({key.removeprefix(prefix): value for key, value in state.items()}, tokens, heads)
    return tokens


def _block(p: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    B, N, C = x.shape
    y = _layer_norm(x, p["norm1.weight"], p["norm1.bias"])
    q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).split(C, dim=-1)
    q, k, v = (t.reshape(B, N, heads, C // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(C // heads)).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(B, N, C)
    x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
    y = _layer_norm(x, p["norm2.weight"], p["norm2.bias"])
    y = y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(dim=-1, keepdim=True) + 1e-6) * weight + bias


def published_state(dim: int, grid: int, blocks: int = 1, pos_embed: bool = True, hidden: int = 4) -> dict:
    """A random denoiser in the published layout, every tensor far from its initial value."""
    state = {"pos_embed": torch.randn(1, grid * grid, dim)} if pos_embed else {}
    for i in range(blocks):
        prefix = "denoiser." if blocks == 1 else f"denoiser.{i}."
        for norm in ("norm1", "norm2"):
            state[f"{prefix}{norm}.weight"] = 1 + 0.3 * torch.randn(dim)
            state[f"{prefix}{norm}.bias"] = 0.3 * torch.randn(dim)
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (hidden, 1), "mlp.fc2": (1, hidden)}
        for layer, (out, into) in layers.items():
            state[f"{prefix}{layer}.weight"] = torch.randn(out * dim, into * dim) / math.sqrt(into * dim)
            state[f"{prefix}{layer}.bias"] = 0.3 * torch.randn(out * dim)
    return state


def published_keys(model: torch.nn.Module) -> dict:
    """The denoiser of a model under the published keys."""
    state = {key.removeprefix("denoiser."): v for key, v in model.state_dict().items() if key.startswith("denoiser.")}
    single = not any(key.startswith("blocks.1.") for key in state)
    return {
        key if key == "pos_embed" else key.replace("blocks.0." if single else "blocks.", "denoiser."): value
        for key, value in state.items()
    }
