"""Conversion and publishing, through the real client and the stand-in hub, to a model that is bit for bit the same."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers import reference
from tests.helpers.fabricated import BACKBONE, publish, publish_backbone, publish_tiny
from timm_dvt import registry
from timm_dvt.__main__ import main
from timm_dvt.publish import push as pushing
from timm_dvt.publish.cards import card as card_of
from timm_dvt.publish.convert import convert
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import Variant
from timm_dvt.weights.saving import write_tensors


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def same(one: str, other: str, **kwargs) -> None:
    """Assert that two names give models with equal weights and outputs, bit for bit, in every state."""
    models = [timm.create_model(name, pretrained=True, **kwargs).eval() for name in (one, other)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    patch = models[0].patch_embed.patch_size[0]
    images = torch.randn(1, 3, 3 * patch, 4 * patch)
    with torch.no_grad():
        for enable in (True, False) if isinstance(models[0], timm_dvt.Denoised) else (None,):
            for model in models:
                if enable is not None:
                    model.set_denoise(enable)
            assert torch.equal(models[0].forward_features(images), models[1].forward_features(images))
            assert torch.equal(models[0](images), models[1](images))


def error(capsys, *arguments) -> str:
    """What the command line says where it fails: one line."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


# ---- the whole way


@pytest.mark.slow
def test_from_a_published_pth_over_convert_push_and_download_to_an_equal_model(account, tmp_path):
    name = "vit_small_patch14_dinov2.lvd142m_dvt"
    backbone = name.removesuffix("_dvt")
    publish_backbone(account, backbone)
    path = publish(account, f"voc_denoised/{backbone}.pth", {"denoiser": reference.published_state(384, 37)})
    assert main(["convert", str(path), "--model", name, "--out", str(tmp_path / "folder")]) == 0
    assert main(["push", str(tmp_path / "folder"), "--repo", f"me/{name}"]) == 0
    hf = Path(sys.executable).with_name("hf")
    tool = hf if hf.exists() else hf.with_name("huggingface-cli")
    subprocess.run([tool, "download", f"me/{name}", "--local-dir", tmp_path / "got"], check=True, capture_output=True)
    assert {path.suffix for path in (tmp_path / "got").iterdir()} >= {".safetensors", ".json", ".md"}
    same(name, f"local-dir:{tmp_path / 'got'}")
    same(name, f"hf-hub:me/{name}")


# ---- convert


@pytest.mark.slow
def test_a_distilled_vit_becomes_a_plain_timm_model(hub, tmp_path):
    name, file = f"{BACKBONE}_dvt_distilled", f"voc_distilled/{BACKBONE}.pth"
    registry._register(Variant(name, BACKBONE, 96, distilled=True, hub_id="jjiaweiyang/DVT", hub_file=file))
    state = timm.create_model(BACKBONE, img_size=96, num_classes=0).state_dict()
    publish(hub, file, {"model": {f"model.{key}": value for key, value in state.items()}})
    folder = convert(None, name, tmp_path / "folder")
    same(name, f"local-dir:{folder}", img_size=96)
    code = f"import timm; timm.create_model('local-dir:{folder}', pretrained=True)"  # needs no timm_dvt
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("form", ["the variant's own", "path", "file of the hub", "hf-hub:", "revision"])
def test_a_source_is_named_in_any_form(form, hub, tmp_path):
    name = publish_tiny(hub)
    file = VARIANTS[name].hub_file
    source = {
        "the variant's own": None,
        "path": str(hub.folder / "jjiaweiyang/DVT" / file),
        "file of the hub": f"jjiaweiyang/DVT/{file}",
        "hf-hub:": f"hf-hub:jjiaweiyang/DVT/{file}",
        "revision": f"hf-hub:jjiaweiyang/DVT@{hub.keep('jjiaweiyang/DVT')}/{file}",
    }[form]
    same(name, f"local-dir:{convert(source, name, tmp_path / 'folder')}")


def test_the_card_of_a_folder_of_ones_own_claims_nothing_published(hub, tmp_path):
    name = publish_tiny(hub)
    first = convert(None, name, tmp_path / "published")
    second = convert(str(first), name, tmp_path / "own")
    cards = [(folder / "README.md").read_text() for folder in (first, second)]
    assert ["published at" in card for card in cards] == [True, False]


def test_a_denoiser_only_folder_fetches_its_backbone(hub, tmp_path):
    name = publish_tiny(hub)
    folder = convert(None, name, tmp_path / "folder", denoiser_only=True)
    assert all(key.startswith("denoiser.") for key in safetensors.torch.load_file(folder / "model.safetensors"))
    card = (folder / "README.md").read_text()
    assert "the denoiser; the backbone's own weights are fetched" in card and "AutoModel" not in card
    same(name, f"local-dir:{folder}")


def test_equal_tensors_are_equal_files_though_the_library_shuffles_metadata(tmp_path):
    tensors, metadata = {"a": torch.ones(3), "é": torch.zeros(2)}, {f"key {i}": "ä" for i in range(6)}
    for i in range(4):
        write_tensors(tensors, tmp_path / str(i), metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1
    with safetensors.safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("é"), torch.zeros(2))


def test_what_convert_cannot_do_is_one_line(hub, tmp_path, capsys):
    name = publish_tiny(hub)
    out = tmp_path / "out"
    (tmp_path / "text.pth").write_text("<html>")
    (tmp_path / "file").write_text("")
    assert "'vit_x' is not a variant" in error(capsys, "convert", "--model", "vit_x", "--out", out)
    assert "text.pth: " in error(capsys, "convert", tmp_path / "text.pth", "--model", name, "--out", out)
    assert "no such file" in error(capsys, "convert", tmp_path / "none.pth", "--model", name, "--out", out)
    assert "no such repo" in error(capsys, "convert", "a/b/c.pth", "--model", name, "--out", out)
    assert "no such file" in error(capsys, "convert", "jjiaweiyang/DVT/c.pth", "--model", name, "--out", out)
    assert "it is a file" in error(capsys, "convert", "--model", name, "--out", tmp_path / "file")
    giant = "vit_giant_patch14_dinov2.lvd142m_dvt"
    assert "No denoiser has been published" in error(capsys, "convert", "--model", giant, "--out", out)
    whole = "vit_base_patch16_224.mae_dvt_distilled"
    assert "whole ViT" in error(capsys, "convert", "--model", whole, "--out", out, "--denoiser-only")
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "holds config.json, not written by convert" in error(capsys, "convert", "--model", name, "--out", out)
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_folder_of_convert_is_written_again(hub, tmp_path, capsys):
    name = publish_tiny(hub)
    for _ in range(2):
        assert main(["convert", "--model", name, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(": README.md, config.json, model.safetensors\n")


# ---- push


def commits(hub) -> list[str]:
    return [request for request in hub.requests if "/commit/" in request]


def test_a_variant_is_published_in_one_commit_and_then_skipped(account, tmp_path, capsys):
    name = publish_tiny(account)
    assert main(["push", name, "--repo", "me/tiny"]) == 0
    assert len(commits(account)) == 1
    files = {path.name for path in (account.folder / "me/tiny").iterdir()}
    assert files == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    text = (account.folder / "me/tiny/README.md").read_text()
    assert "hf-hub:me/tiny" in text and "NAMESPACE" not in text
    same(name, "hf-hub:me/tiny")
    capsys.readouterr()
    assert main(["push", name, "--repo", "me/tiny"]) == 0
    assert len(commits(account)) == 1 and "nothing to do" in capsys.readouterr().out


def test_only_what_differs_is_published(account, tmp_path):
    name = publish_tiny(account)
    folder = convert(None, name, tmp_path / "folder")
    main(["push", str(folder), "--repo", "me/tiny"])
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nOne more line.\n")
    account.requests.clear()
    main(["push", str(folder), "--repo", "me/tiny"])
    assert len(commits(account)) == 1 and not [request for request in account.requests if request.startswith("PUT")]
    assert (account.folder / "me/tiny/README.md").read_text().endswith("One more line.\n")


def test_a_dry_run_writes_nothing(account, tmp_path, capsys, monkeypatch):
    name = publish_tiny(account)
    folder = convert(None, name, tmp_path / "folder")
    account.requests.clear()
    assert main(["push", name, "--repo", "me/tiny", "--dry-run"]) == 0
    assert main(["push", str(folder), "--repo", "me/tiny", "--dry-run"]) == 0
    monkeypatch.setattr(pushing, "publishable", lambda: [VARIANTS[name]])
    assert main(["push", "--all", "--namespace", "me", "--dry-run"]) == 0
    assert "model.safetensors (1.7 MB)" in capsys.readouterr().out
    assert all(request.startswith("GET /api/models/me") for request in account.requests)
    assert not (account.folder / "me").exists()


def test_a_pull_request_leaves_main_alone(account):
    name = publish_tiny(account)
    (account.folder / "me/tiny").mkdir(parents=True)
    assert main(["push", name, "--repo", "me/tiny", "--create-pr"]) == 0
    assert not (account.folder / "me/tiny/model.safetensors").exists()
    same(name, "hf-hub:me/tiny@refs/pr/1")


def test_private_is_private_or_refused(account, capsys):
    name = publish_tiny(account)
    assert main(["push", name, "--repo", "me/tiny", "--private"]) == 0
    assert account.private == {"me/tiny"}
    (account.folder / "me/public").mkdir()
    assert "exists and is public" in error(capsys, "push", name, "--repo", "me/public", "--private")
    assert not list((account.folder / "me/public").iterdir())


def test_all_continues_after_it_was_cut_short(account, monkeypatch, capsys):
    name = publish_tiny(account)
    names = [name, f"{name}_2"]
    monkeypatch.setattr(pushing, "publishable", lambda: [VARIANTS[name], second])
    register = {"resolution": 96, "hub_id": "jjiaweiyang/DVT", "hub_file": VARIANTS[name].hub_file}
    second = VARIANTS[timm_dvt.register(VARIANTS[name].backbone, "dvt_small_2", **register)]
    account.fail(f"POST /api/models/me/{names[1]}/commit", 500)
    assert "1 of 2 failed; run this again" in error(capsys, "push", "--all", "--namespace", "me")
    assert len(commits(account)) == 2
    assert main(["push", "--all", "--namespace", "me"]) == 0
    assert commits(account)[2:] == [f"POST /api/models/me/{names[1]}/commit/main"]
    for one in names:
        same(one, f"hf-hub:me/{one}")


def test_what_push_cannot_do_is_one_line(account, tmp_path, capsys, monkeypatch):
    name = publish_tiny(account)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "empty").mkdir()
    assert "neither a folder nor a variant" in error(capsys, "push", "nothing", "--repo", "me/x")
    assert "has no model.safetensors" in error(capsys, "push", tmp_path / "empty", "--repo", "me/x")
    assert "is not the id of a repo" in error(capsys, "push", name, "--repo", "me/x/../y")
    assert "names no account" in error(capsys, "push", name, "--repo", "x")
    assert "say what to publish and where" in error(capsys, "push", name)
    assert "say what to publish and where" in error(capsys, "push", "--all")
    assert "does not exist" in error(capsys, "push", name, "--repo", "me/x", "--create-pr")
    giant = "vit_giant_patch14_dinov2.lvd142m_dvt"
    assert "nothing has been published" in error(capsys, "push", giant, "--repo", "me/x")
    assert "token may not do this in them/x" in error(capsys, "push", name, "--repo", "them/x")
    account.fail("GET /api/models", 503, times=99)
    assert "(503); run this again later" in error(capsys, "push", name, "--repo", "me/x")
    account.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "needs a token that the Hub knows; log in" in error(capsys, "push", name, "--repo", "me/x")
    monkeypatch.delenv("HF_TOKEN")
    assert "log in" in error(capsys, "push", name, "--repo", "me/x")
    assert not (account.folder / "me").exists()


def test_the_card_of_ones_own_denoisers_says_which_blocks_have_one_and_nothing_published(account, tmp_path):
    name = "vit_base_patch16_224.mae_dvt"
    thin = {"depth": 3, "embed_dim": 64, "num_heads": 1}
    for layers, said in (((1,), "the last block has no denoiser"), ((0, 2), "blocks 0, 2 are denoised")):
        model = timm.create_model(name, img_size=64, **thin, denoiser={"layers": layers})
        folder = timm_dvt.save_pretrained(model, tmp_path / f"of {len(layers)}", model_args=thin)
        assert pushing.push(str(folder), "me/own")
        card = (account.folder / "me/own/README.md").read_text()
        assert said in card and "denoisers are appended to the blocks" in card
        assert "of the last block are denoised" not in card and "after the final norm" not in card
    text = str(card_of(VARIANTS[name], own=True))
    assert "trained on" not in text.split("## Use")[0] and "published at" not in text and "## Results" not in text
    assert "trained on" in str(card_of(VARIANTS[name])).split("## Use")[0]


def test_a_model_of_ones_own_gets_a_card_without_published_results(account, tmp_path):
    thin = {"depth": 1, "embed_dim": 64, "num_heads": 1}
    backbone = "vit_base_patch16_224.mae"  # a name that has published results, with weights that are not those
    model = timm.create_model(f"{backbone}_dvt", img_size=64, **thin)
    folder = timm_dvt.save_pretrained(model, tmp_path / "own", model_args=thin)
    assert pushing.push(str(folder), "me/own")
    card = huggingface_hub.ModelCard((account.folder / "me/own/README.md").read_text())
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == f"timm/{backbone}"
    assert card.data.eval_results is None and "as published" not in card.content
    same(f"local-dir:{folder}", "hf-hub:me/own")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_link_that_leaves_the_folder_is_not_published(name, account, tmp_path, capsys):
    folder = convert(None, publish_tiny(account), tmp_path / "folder")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    assert f"{name} is a link that leaves the folder" in error(capsys, "push", folder, "--repo", "me/tiny")
    assert f"{name} is a link that leaves the folder" in error(capsys, "push", folder, "--repo", "me/tiny", "--dry-run")
    (tmp_path / "secret").rename(folder / "within")
    (folder / name).unlink()
    (folder / name).symlink_to("within")
    assert main(["push", str(folder), "--repo", "me/tiny"]) == 0
    (tmp_path / "linked").symlink_to(folder)
    assert main(["push", str(tmp_path / "linked"), "--repo", "me/other"]) == 0
