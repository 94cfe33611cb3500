"""Model cards: fresh, valid for huggingface_hub, and true to the table, to timm and to the README."""

import re
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard

from tests.helpers.processes import run
from timm_dvt.__main__ import main
from timm_dvt.publish import cards, published
from timm_dvt.publish.cards import card, publishable, stale_cards
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import FOCUS, Variant

FOLDER = Path(__file__).parents[2] / "hub_cards"
NAMES = [variant.name for variant in publishable()]
PUBLISHED = [name for name in NAMES if name != FOCUS.name]


def written(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_the_cards_there_are_those_that_would_be_written():
    assert stale_cards(FOLDER) == [], "run timm-dvt cards"


def test_stale_cards_are_named(tmp_path, capsys, monkeypatch):
    some = publishable()[:2]
    monkeypatch.setattr("timm_dvt.publish.cards.publishable", lambda: some)
    (tmp_path / "old.md").write_text("of a variant that is gone")
    assert main(["cards", "--out", str(tmp_path)]) == 0 and main(["cards", "--out", str(tmp_path), "--check"]) == 0
    (tmp_path / f"{some[0].name}.md").write_text("changed by hand")
    (tmp_path / f"{some[1].name}.md").unlink()
    assert main(["cards", "--out", str(tmp_path), "--check"]) == 2
    said = capsys.readouterr().err
    assert all(f"{variant.name}.md" in said for variant in some) and said.count("\n") == 1


def test_files_of_others_stay_and_cards_of_former_variants_go(tmp_path, monkeypatch):
    former, *some = publishable()[:3]
    monkeypatch.setattr("timm_dvt.publish.cards.publishable", lambda: [former])
    main(["cards", "--out", str(tmp_path)])
    monkeypatch.setattr("timm_dvt.publish.cards.publishable", lambda: some)
    notes = {"README.md": b"# mine", "notes.md": b"\xff\xfe of another encoding"}
    for name, content in notes.items():
        (tmp_path / name).write_bytes(content)
    assert main(["cards", "--out", str(tmp_path), "--check"]) == 2
    assert main(["cards", "--out", str(tmp_path)]) == main(["cards", "--out", str(tmp_path), "--check"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*notes, *(f"{variant.name}.md" for variant in some)}
    assert all((tmp_path / name).read_bytes() == content for name, content in notes.items())


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_one_line(out, capsys):
    assert main(["cards", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: ") and said.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_valid_and_complete(name, hub):
    variant, text = VARIANTS[name], written(name)
    parsed = ModelCard(text)
    parsed.validate()  # the client's: through the hub's /api/validate-yaml
    data = parsed.data
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()
    assert (
        data.library_name == ("timm" if variant.distilled else "timm-dvt")
        and data.pipeline_tag == "image-feature-extraction"
    )
    backbone = timm.get_pretrained_cfg(variant.backbone)
    assert data.license == variant.license == backbone.license and data.base_model == (
        backbone.hf_hub_id or cards.RELATIVE
    )
    assert {"timm", "timm-dvt"} <= set(data.tags)
    for command in ("hf download", "huggingface-cli download"):
        assert f"\n{command} NAMESPACE/{name}" in text
    assert f"hf-hub:NAMESPACE/{name}" in text
    assert all(part in text for part in ("import timm_dvt", "## Limits", "@inproceedings"))
    assert ("set_denoise(False)" in text) != variant.distilled
    assert "{{" not in text and "{%" not in text and "None" not in text


METRICS = {
    ("nateraw/pascal-voc-2012", "mean_iou"): published.VOC,
    ("nateraw/pascal-voc-2012", "mean_accuracy"): published.VOC_ACC,
    ("zhoubolei/scene_parse_150", "mean_iou"): published.ADE,
    ("zhoubolei/scene_parse_150", "mean_accuracy"): published.ADE_ACC,
    ("sayakpaul/nyu_depth_v2", "rmse"): published.RMSE,
    ("sayakpaul/nyu_depth_v2", "abs_rel"): published.ABSREL,
    ("sayakpaul/nyu_depth_v2", "a1"): published.DELTA,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_results_are_the_published_ones_and_marked_as_such(name):
    variant = VARIANTS[name]
    table = published.PUBLISHED[published.README]
    states = {"raw": "raw", "distilled" if variant.distilled else "denoised": variant.hub_file.split("/")[0]}
    want = {
        (state, dataset, metric): table[variant.backbone, kind][key]
        for state, kind in states.items()
        for (dataset, metric), key in METRICS.items()
        if key in table[variant.backbone, kind]
    }
    listed = ModelCard(written(name)).data.eval_results
    got = {(r.metric_name.split(", ")[1].split()[0], r.dataset_type, r.metric_type): r.metric_value for r in listed}
    of_the_model = {key: value for key, value in want.items() if key[0] != "raw"}  # the backbone's stand in the text
    assert got == of_the_model and len(listed) == len(of_the_model) >= 4
    for result in listed:
        assert "published" in result.metric_name and "not measured" in result.source_name
        assert result.source_url == published.README.url
    line = r"^\| (raw|denoised|distilled) \| (authors' README|paper) \| (.*) \|$"
    rows = re.findall(line, written(name), re.MULTILINE)
    for state, source, cells in rows:
        (numbers,) = [table for place, table in published.PUBLISHED.items() if place.short == source]
        numbers = numbers[variant.backbone, states[state]]
        got = [cell and float(cell) for cell in cells.split(" | ")]
        assert got == [numbers.get(key, "") for key in METRICS.values()]
    in_paper = (variant.backbone, states[rows[-1][0]]) in published.PUBLISHED[published.PAPER]
    assert len(rows) == 4 if in_paper else 2
    assert {state for state, *_ in rows} == set(states)


def test_the_readme_has_the_published_numbers():
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)`( \(`_in1k`\))? \| (.*→.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 3
    for backbone, in1k, cells in rows:
        folder = "imgnet" if in1k else "voc"
        kinds = [("raw"), f"{folder}_denoised", f"{folder}_distilled"]
        known = [table for kind in kinds if (table := published.PUBLISHED[published.README].get((backbone, kind)))]
        for cell, key in zip(cells.split(" | "), (published.VOC, published.ADE, published.DELTA)):
            numbers = [None if number == "–" else float(number) for number in cell.split(" → ")]
            assert numbers == [table.get(key) for table in known], (backbone, cell)


@pytest.mark.parametrize("name", [name for name in NAMES if "small" in name or "distilled" in name])
def test_the_size_is_that_of_the_weights(name):
    model = timm.create_model(name, device="meta")
    megabytes = sum(4 * parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"| `model.safetensors` | {megabytes:.1f} MB |" in written(name)


def test_only_variants_with_weights_have_a_card():
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted(NAMES) and not any("giant" in n for n in NAMES)


@pytest.mark.slow
def test_the_code_of_a_card_runs(tmp_path):
    text = str(card(VARIANTS["vit_small_patch14_reg4_dinov2.lvd142m_dvt"], "me/model"))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace('"hf-hub:me/model", pretrained=True', '"vit_small_patch14_reg4_dinov2.lvd142m_dvt", depth=1')
    check = "\nassert tokens.shape == (1, 1374, 384) and maps.shape == (1, 384, 37, 37)"
    assert "(1, 1374, 384): 5 prefix tokens" in code and "(1, 384, 37, 37)" in code
    assert run("-c", code + check)[0] == 0


def test_a_variant_of_a_packages_file_has_a_card_without_results():
    backbone = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    own = Variant(f"{backbone}_x", backbone, 192, file="x.safetensors", license="cc-by-sa-4.0")
    text = str(card(own, "me/x", model=timm.create_model("vit_tiny_patch16_224", img_size=192, device="meta")))
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "cc-by-sa-4.0" and "model-index" not in data and "as published" not in text
