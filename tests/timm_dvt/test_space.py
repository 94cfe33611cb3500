"""The page as a Space: published through the real client to the stand-in hub, and whole without this checkout."""

import configparser
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from packaging.requirements import Requirement

from timm_dvt.__main__ import main
from timm_dvt.publish import space


def commits(hub) -> list[str]:
    return [request for request in hub.requests if "/commit/" in request]


def test_the_space_is_published_in_one_commit_and_then_skipped(account, capsys):
    assert main(["push", "--space", "--repo", "me/page"]) == 0
    assert account.kinds == {"me/page": ("space", "gradio")}
    assert commits(account) == ["POST /api/spaces/me/page/commit/main"]
    assert main(["push", "hub_cards/space", "--space", "--repo", "me/page"]) == 0
    assert len(commits(account)) == 1 and "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_published_is_whole_without_the_checkout(account, tmp_path):
    main(["push", "--space", "--repo", "me/page"])
    published = account.folder / "me/page"
    code = "import timm, timm_dvt; print(timm_dvt.__file__); timm.create_model('vit_small_patch14_dinov2.focus_dvt')"
    run = subprocess.run([sys.executable, "-c", code], cwd=published, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(published / "timm_dvt/__init__.py")
    sent = {path.relative_to(published).as_posix() for path in published.rglob("*") if "__pycache__" not in path.parts}
    assert {"app.py", "timm_dvt/assets/app.js", "timm_dvt/assets/focus/denoiser.safetensors"} <= sent


def test_a_dry_run_writes_nothing(account, capsys):
    assert main(["push", "--space", "--repo", "me/page", "--dry-run"]) == 0
    assert "would create the repo and commit README.md" in capsys.readouterr().out
    assert not commits(account) and not (account.folder / "me").exists()


@pytest.mark.parametrize("name", space.FILES)
def test_a_folder_that_is_no_space_is_one_line(name, account, tmp_path, capsys):
    for file in space.FILES:
        (tmp_path / file).write_text(Path(space.FOLDER, file).read_text())
    (tmp_path / name).unlink()
    assert main(["push", str(tmp_path), "--space", "--repo", "me/page"]) == 2
    assert f"has no {name}" in capsys.readouterr().err
    assert main(["push", "--space"]) == 2
    assert "--space --repo ORG/NAME" in capsys.readouterr().err
    (tmp_path / name).write_text("---\nsdk: docker\n---\n")
    if name == "README.md":
        assert main(["push", str(tmp_path), "--space", "--repo", "me/page"]) == 2
        assert "sdk: docker" in capsys.readouterr().err


def test_its_requirements_are_the_packages_and_its_gradio_is_one_that_the_extra_takes():
    declared = configparser.ConfigParser()
    declared.read("setup.cfg")
    wanted = declared["options"]["install_requires"] + declared["options.extras_require"]["dinov2"]
    of_app = set(declared["options.extras_require"]["app"].split())
    required = Path(space.FOLDER, "requirements.txt").read_text().split()
    assert required == [*wanted.split(), "pi-heif"] and "pi-heif" in of_app  # the space itself has gradio
    card = huggingface_hub.RepoCard.load(Path(space.FOLDER, "README.md")).data
    gradio = Requirement(declared["options.extras_require"]["app"].split()[0])
    assert gradio.name == card.sdk == "gradio" and card.sdk_version in gradio.specifier
    assert len(card.short_description) <= 60 and Path(space.FOLDER, card.app_file).is_file()  # the Hub's limit


def test_its_app_is_three_lines_that_serve_the_page():
    lines = Path(space.FOLDER, "app.py").read_text().splitlines()
    assert lines == ["from timm_dvt.viewer.app import serve", "", 'serve(host="0.0.0.0", port=7860)']
