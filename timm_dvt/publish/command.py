"""The verbs `convert`, `cards` and `push`."""

import argparse

from timm_dvt.errors import UserError
from timm_dvt.publish.cards import stale_cards, write_cards
from timm_dvt.publish.convert import WRITTEN, convert
from timm_dvt.publish.push import push, push_all
from timm_dvt.publish.space import FOLDER as SPACE
from timm_dvt.publish.space import push_space


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Options of `convert`."""
    parser.description = (
        "Write a variant as a folder of model.safetensors, config.json and README.md (its card), which "
        "timm.create_model('local-dir:FOLDER', pretrained=True) loads with equal outputs."
    )
    parser.epilog = "Example: %(prog)s --model vit_base_patch14_dinov2.lvd142m_dvt --out vitb_dvt"
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a .pth or safetensors file, or one of the Hub: ORG/REPO/FILE, hf-hub:ORG/REPO (default: where the "
        "variant's weights are published)",
    )
    parser.add_argument("--model", metavar="NAME", required=True, help="the variant")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="made if it does not exist")
    parser.add_argument(
        "--denoiser-only", action="store_true", help="leave out the backbone; its own repo's is fetched on loading"
    )
    parser.set_defaults(run=_convert)


def add_cards(parser: argparse.ArgumentParser) -> None:
    """Options of `cards`."""
    parser.description = "Write the model cards of all variants."
    parser.epilog = "Example: %(prog)s --check"
    parser.add_argument("--out", metavar="FOLDER", default="hub_cards", help="(default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the cards there are stale")
    parser.set_defaults(run=_cards)


def add_push(parser: argparse.ArgumentParser) -> None:
    """Options of `push`."""
    parser.description = (
        "Publish weights, config.json and card in one commit. Files that the repo has already, by their "
        "hashes, are left out, so a run that was cut short is continued by the same command. Log in first: hf auth "
        "login (huggingface-cli login below huggingface_hub 1.0), or set HF_TOKEN."
    )
    parser.epilog = "Example: %(prog)s vitb_dvt --repo me/vitb_dvt --dry-run"
    parser.add_argument("target", nargs="?", metavar="FOLDER|NAME", help="a folder of convert, or a variant's name")
    parser.add_argument("--repo", metavar="ORG/NAME", help="the repo; made if it does not exist")
    parser.add_argument("--space", action="store_true", help=f"publish the page as a Space (FOLDER: {SPACE})")
    parser.add_argument("--all", action="store_true", help="publish every variant, each in a repo of its name")
    parser.add_argument("--namespace", metavar="NS", help="with --all: the account or organization")
    parser.add_argument("--private", action="store_true", help="make the repo a private one")
    parser.add_argument("--create-pr", action="store_true", help="propose a pull request to a repo that exists")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.set_defaults(run=_push)


def _convert(args: argparse.Namespace) -> None:
    folder = convert(args.source, args.model, args.out, args.denoiser_only)
    print(f"wrote {folder}: {', '.join(WRITTEN)}")


def _cards(args: argparse.Namespace) -> None:
    if not args.check:
        print(f"wrote {len(write_cards(args.out, progress=True))} cards to {args.out}")
    elif stale := stale_cards(args.out, progress=True):
        raise UserError(f"stale in {args.out}: {', '.join(stale)}; run timm-dvt cards --out {args.out}")


def _push(args: argparse.Namespace) -> None:
    if args.space:
        if not args.repo or args.all:
            raise UserError("say where to publish the page: --space --repo ORG/NAME")
        push_space(args.target or SPACE, args.repo, args.private, args.create_pr, args.dry_run)
        return
    single, every = args.target and args.repo, args.all and args.namespace
    if bool(single) == bool(every) or (every and (args.target or args.repo)):
        raise UserError("say what to publish and where: FOLDER|NAME --repo ORG/NAME, or --all --namespace NS")
    if every and args.create_pr:
        raise UserError("--create-pr is for one repo that exists, not for --all")
    if single:
        push(args.target, args.repo, args.private, args.create_pr, args.dry_run)
    else:
        push_all(args.namespace, args.private, args.dry_run)
