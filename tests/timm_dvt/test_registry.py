"""What importing timm_dvt changes in timm: new names, and nothing else."""

import functools
import json
import subprocess
import sys

import pytest

SNAPSHOT = """
import json, sys, warnings
import socket
opened = []
real = socket.socket
class Socket(real):
    def __init__(self, *args, **kwargs):
        opened.append(args); super().__init__(*args, **kwargs)
socket.socket = Socket
caught = warnings.catch_warnings(record=True)
log = caught.__enter__(); warnings.simplefilter("always")
import logging
records = []
handler = logging.Handler(); handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger().addHandler(handler)
import timm, torch
first = None
if "before" in sys.argv: first = timm.create_model("vit_tiny_patch16_224", depth=1)
if "dvt" in sys.argv:
    import timm_dvt, importlib
    importlib.reload(timm_dvt); timm_dvt.register_all()
from timm.models import _registry as r
def ours(name): return "_dvt" in name or name in ("denoised_vit", "vit_small_patch14_dinov2.focus")
def digest(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, *model.patch_embed.img_size))
    return [type(model).__name__, repr(model.pretrained_cfg), float(out.double().sum()), out.shape[-1]]
tables = {}
for table in ("_model_to_module", "_model_pretrained_cfgs", "_model_default_cfgs", "_model_with_tags",
              "_deprecated_models"):
    tables[table] = {k: repr(v) for k, v in getattr(r, table).items() if not ours(k)}
print(json.dumps({
    "opened": len(opened), "messages": [str(w.message) for w in log] + records,
    "tables": tables,
    "entrypoints": sorted(k for k in r._model_entrypoints if not ours(k)),
    "pretrained": sorted(k for k in r._model_has_pretrained if not ours(k)),
    "modules": sorted(set(timm.list_modules()) - {"timm_dvt"}),
    "lists": [[n for n in timm.list_models(*a, **k) if not ours(n)] for a, k in [((), {}), (("vit*",), {}),
        (("*dinov2*",), dict(pretrained=True)), ((), dict(include_tags=True)), ((), dict(module="eva"))]],
    "cfgs": repr(timm.models.get_arch_pretrained_cfgs("vit_base_patch14_dinov2")),
    "models": [digest("vit_small_patch14_dinov2", depth=1, img_size=56),
        digest("vit_small_patch14_dinov2.lvd142m", depth=1),
        digest("eva02_base_patch16_clip_224", depth=1), digest("vit_base_patch16_224.dino", depth=1),
        digest("deit3_base_patch16_224.fb_in22k_ft_in1k", depth=1)],
}))
"""


@functools.cache
def snapshot(*arguments: str) -> dict:
    run = subprocess.run([sys.executable, "-c", SNAPSHOT, *arguments], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.sweep), "after"])
def test_nothing_of_timms_own_changes_and_no_socket_is_opened(when):
    plain, ours = snapshot(), snapshot(when, "dvt")
    assert ours["opened"] == 0
    for key in plain:
        assert ours[key] == plain[key], key
