"""What commands do alike: help from a module's docstring, the model's options, errors on standard error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from timm_dvt.errors import UserError, memory_words, too_little_memory
from timm_dvt.options import at_least, refuse_empty
from timm_dvt.shared_folder import OutputError


def help_from(doc: str | None) -> dict[str, Any]:
    """Arguments of an ArgumentParser: a docstring's first paragraph above the options, the rest as it is below."""
    head, _, rest = (doc or "").partition("\n\n")  # there is none under python -OO
    return {"description": head, "epilog": rest, "formatter_class": Help}


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m training.NAME` with the help of its module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{name}", **help_from(doc))
    refuse_empty(parser)
    return parser


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that says of each number of `at_least` which is the smallest."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        least = getattr(action.type, "least", 0)
        return f"{action.help}; {least} or more" if least > 1 else action.help


def flush_subnormals() -> None:
    """Let this process's CPU take numbers below 1e-38 for 0, which they are to any training.

    Second moments of AdamW get there (they are squares of gradients), and some processors are ten to twenty times
    slower on them. To be called before threads compute: they take the setting over from the one that starts them.
    """
    torch.set_flush_denormal(True)


def complain(code: int, error: Exception | str) -> int:
    """Say what is wrong on standard error; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code


class Diverged(ArithmeticError):
    """The loss or the weights are no longer finite, or beyond reason."""

    @classmethod
    def beyond(cls, loss: float, limit: float, step: int, lr: float, otherwise: str = "") -> Diverged:
        """For a loss beyond `loss_limit` after `step` steps; `otherwise` is what else it may come from."""
        return cls(
            f"the loss diverged: {loss:.4g} at step {step}, ten times what predicting nothing would give "
            f"({limit / 10:.4g}), at a learning rate of {lr:.3g}; use a smaller --lr or a longer --warmup, "
            f"and another --out{otherwise}"
        )


CONTINUES = "run the same command again to continue."


def exit_code_of(run: Callable[[], int | None], os_error: int = 2, then: str = CONTINUES) -> int:
    """What a command returns: what `run` does, or for what stops it a line and its code.

    1 the loss diverged, 2 what the person can put right, 3 the output folder cannot be written, 130 stopped by Ctrl-C,
    141 by the end of a pipe, as a shell says it; `os_error` for other errors of the system. `then` is what to do when
    it was stopped.
    """
    try:
        return run() or 0
    except Diverged as error:
        return complain(1, error)
    except UserError as error:
        return complain(2, error)
    except OutputError as error:
        return complain(3, f"{error}\nOnce that is settled, {CONTINUES}")
    except BrokenPipeError:  # whoever read what this prints, `head` say, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return complain(141, f"standard output was closed; {then}")
    except OSError as error:
        return complain(os_error, error)
    except (MemoryError, RuntimeError) as error:
        if not too_little_memory(error):
            raise
        return complain(2, memory_words(error))
    except KeyboardInterrupt:
        return complain(130, f"stopped; {then}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command line --model, --pretrained / --no-pretrained, --seed and --device."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="any model of timm-dvt families: a timm name, hf-hub:OWNER/REPO or local-dir:FOLDER",
    )
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pretrained weights, or, with --no-pretrained, random ones drawn from --seed (needs no network)",
    )
    parser.add_argument("--seed", type=whole, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps or auto: a GPU if there is one (default)"
    )


positive, whole = at_least(1), at_least(0)
