"""What ends a command before or beside its work: Ctrl-C while it imports, packages that are missing, no output."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Sends this process what Ctrl-C sends, once the module is about to be imported.
SITE = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())

# As PYTHONOPTIMIZE=2, of our own modules alone: to compile torch anew takes half a minute.
from importlib.machinery import SourceFileLoader
as_it_is = SourceFileLoader.get_code
def get_code(self, name):
    if os.environ.get("OPTIMIZED") and name.split(".")[0] in ("timm_dvt", "training", "__main__"):
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=2)
    return as_it_is(self, name)
SourceFileLoader.get_code = get_code
"""


def run(command, at, tmp_path, **more):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"INTERRUPTED_AT": at, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} | more

    def listen():  # a shell's background job, and so what it starts, does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    how = dict(env=environment, capture_output=True, text=True, cwd=ROOT, preexec_fn=listen)
    return subprocess.run([sys.executable, *command], **how)


@pytest.mark.parametrize("at", ["torch", pytest.param("timm_dvt.registry", marks=pytest.mark.slow)])
def test_the_plug_ins_command_ends_in_one_line_while_it_imports(at, tmp_path):
    ended = run(["-m", "timm_dvt", "list"], at, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("module", ["evaluate", pytest.param("benchmark.inference", marks=pytest.mark.slow)])
def test_a_command_of_training_does_so_too(module, tmp_path):
    ended = run(["-m", f"training.{module}", "--help"], "torch.nn", tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_the_installed_script_does_so_too(tmp_path):
    script = tmp_path / "timm-dvt"
    script.write_text("import sys\nfrom timm_dvt.__main__ import main\nsys.exit(main())\n")
    ended = run([str(script), "list"], "torch", tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_a_program_that_imports_the_package_keeps_its_own_ctrl_c(tmp_path):
    code = "import timm_dvt.__main__, training"
    ended = run(["-c", f"import signal, sys\n{code}\nprint(signal.getsignal(2), sys.excepthook)"], "-", tmp_path)
    assert "default_int_handler" in ended.stdout and "built-in function excepthook" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["timm_dvt", "--help"],
        ["training.make_denoiser", "--help"],
        pytest.param(["training.evaluate", "--help"], marks=pytest.mark.sweep),
    ],
    ids=lambda command: command[0],
)
def test_a_command_works_without_docstrings(command, tmp_path):
    ended = run(["-m", *command], "-", tmp_path, OPTIMIZED="yes")
    assert ended.returncode == 0 and "usage: " in ended.stdout and not ended.stderr


def test_a_command_goes_on_where_what_it_prints_cannot_be_shown(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m timm_dvt"
    words = "inspect --model test_vit --no-pretrained --views 32 --out out"
    for line in (f"PYTHONIOENCODING=ascii {command} {words}", f"{command} list >&-"):
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr
    assert (tmp_path / "out" / "inspection.json").is_file()


def test_a_missing_package_of_training_is_one_line(tmp_path):
    code = (
        "import importlib.util as util, runpy\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torchmetrics' else real(name, *more)\n"
        "runpy.run_module('training.make_denoiser', run_name='__main__')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "(torchmetrics): pip install -e" in ended.stderr
