"""Publishing on the Hub: a folder or a variant as one commit of weights, config.json and card."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import timm
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg

from timm_dvt.attach import Denoised
from timm_dvt.errors import UserError, WeightsNotFoundError, first_line
from timm_dvt.layouts import meant_size
from timm_dvt.loading import did_you_mean
from timm_dvt.publish.cards import NAMESPACE, NOTE, card, has_weights, publishable, readable, weight_bytes
from timm_dvt.publish.convert import convert
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import Variant
from timm_dvt.version import REPOSITORY
from timm_dvt.weights.checkpoints import CheckpointError
from timm_dvt.weights.fetching import WEIGHTS_NAME, explain, git_hash, sha256

FILES = (WEIGHTS_NAME, "config.json", "README.md")


def push(target: str, repo_id: str, private: bool = False, create_pr: bool = False, dry_run: bool = False) -> bool:
    """Publish a folder, or a variant converted on the way; files the repo has already, by their hashes, are left out.

    Args:
        target: a folder of `save_pretrained` or `convert`, or the name of a variant.
        repo_id: ORG/NAME; made if it does not exist.
        private: make it a private one. Refused where it exists and is public.
        create_pr: propose the commit as a pull request to a repo that exists.
        dry_run: only say what would be done.

    Returns:
        Whether there was anything to publish.

    Raises:
        UserError: the target, the repo or the account cannot be used. WeightsNotFoundError, CheckpointError.
    """
    check_id(repo_id)
    is_folder = Path(target).is_dir()
    if not is_folder and target not in VARIANTS:
        raise UserError(
            f"{target!r} is neither a folder nor a variant; timm-dvt list prints the variants"
            f"{did_you_mean(target, list(VARIANTS))}"
        )
    if not is_folder and not has_weights(VARIANTS[target]):
        raise UserError(f"nothing has been published for {target}, so there is nothing to push")
    api = HfApi()
    with hub_errors(repo_id):
        there = files_there(api, repo_id, private, create_pr)
        if dry_run and not is_folder:
            return _say_variant(VARIANTS[target], repo_id, there)
        if not dry_run:
            api.whoami()  # a token that is not valid is found out before anything slow
    with tempfile.TemporaryDirectory(prefix="timm_dvt_") as temporary:
        folder = Path(target) if is_folder else convert(None, target, Path(temporary) / "model")
        files = _gather(folder, repo_id, Path(temporary))
        message = f"Publish {Path(target).name if is_folder else target}"
        return commit(api, repo_id, files, there, message, private, create_pr, dry_run)


def commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path],
    there: dict[str, str] | None,
    message: str,
    private: bool,
    create_pr: bool,
    dry_run: bool,
    kind: str = "model",
) -> bool:
    """Commit what differs of files, by their names in the repo, from those `there`; made if there is None.

    Returns:
        Whether there was anything to publish.
    """
    new = {name: content for name, content in files.items() if (there or {}).get(name) not in _hashes(content)}
    if not new:
        print(f"{repo_id}: nothing to do, all files are there with equal hashes")
        return False
    if "/OWNER/" in REPOSITORY:
        print("note: the repository's address is not set yet, and cards link to it; CONTRIBUTING.md says how to set it")
    sizes = ", ".join(f"{name} ({readable(content.stat().st_size)})" for name, content in new.items())
    if dry_run:
        print(f"{repo_id}: would {'create the repo and ' if there is None else ''}commit {sizes}")
        return True
    with hub_errors(repo_id):
        if there is None:
            sdk = "gradio" if kind == "space" else None
            api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        made = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in new.items()],
            commit_message=message,
            create_pr=create_pr,
            repo_type=kind,
        )
    print(f"{repo_id}: {made.pr_url or made.commit_url} ({sizes})")
    return True


def push_all(namespace: str, private: bool = False, dry_run: bool = False) -> int:
    """Publish every variant as NAMESPACE/NAME, and go on where a variant fails; run again, it continues.

    Returns:
        How many there are.

    Raises:
        UserError: after the others are through, the first that failed and how many did.
    """
    failed = []
    variants = publishable()
    for variant in variants:
        try:
            push(variant.name, f"{namespace}/{variant.name}", private, dry_run=dry_run)
        except (UserError, WeightsNotFoundError, CheckpointError) as e:
            failed.append(f"{variant.name}: {e}")
            print(f"{namespace}/{variant.name}: failed, going on")
    if failed:
        raise UserError(f"{len(failed)} of {len(variants)} failed; run this again to continue. First: {failed[0]}")
    return len(variants)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Tell what the Hub refuses in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # the client raises its own, the network library's and the system's errors
        raise UserError(f"cannot publish {repo_id}: {explain(e, repo_id)}") from e


def check_id(repo_id: str) -> None:
    """Raise UserError for what is not ORG/NAME."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise UserError(f"{repo_id!r} is not the id of a repo, ORG/NAME") from e
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} names no account; an id is ORG/NAME")


def files_there(api: HfApi, repo_id: str, private: bool, create_pr: bool, kind: str = "model") -> dict[str, str] | None:
    """Hashes of a repo's files, or None where it does not exist. Raises UserError where it is not as asked for."""
    try:
        info = api.repo_info(repo_id, repo_type=kind, files_metadata=True)
    except RepositoryNotFoundError:
        if create_pr:
            raise UserError(f"{repo_id} does not exist, or is private to others; leave --create-pr out to make it")
        return None
    if private and not info.private:
        raise UserError(f"{repo_id} exists and is public; make it private in its settings, or leave --private out")
    return {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id or "" for s in getattr(info, "siblings", None) or []}


def _say_variant(variant: Variant, repo_id: str, there: dict | None) -> bool:
    """What a push of a variant would do, as far as can be said without fetching and converting its weights."""
    size = readable(weight_bytes(timm.create_model(variant.name, device="meta")))
    state = "would create the repo and" if there is None else "the repo is there; would"
    files = f"{WEIGHTS_NAME} ({size}, from {variant.source}), {FILES[1]}, {FILES[2]}"
    print(f"{repo_id}: {state} commit what differs of {files}")
    return True


def _gather(folder: Path, repo_id: str, temporary: Path) -> dict[str, Path]:
    """The files to publish, by their names in the repo; the card gets the repo's id. Raises UserError."""
    for name in FILES:
        if not is_inside(folder, name) and name != "README.md":
            raise UserError(f"{folder} has no {name}; timm_dvt.save_pretrained or timm-dvt convert makes one")
    try:
        with safetensors.safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            denoiser_only = all(key.startswith("denoiser.") for key in file.keys())
    except Exception as e:  # the library's own
        raise UserError(f"{folder / WEIGHTS_NAME} is damaged or not safetensors: {e}") from e
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8")
    else:
        text = str(_own_card(folder, repo_id, denoiser_only))
    text = re.sub(rf"\b{NAMESPACE}/[\w.-]+", repo_id, text.replace(f"{NOTE}\n\n", ""))
    load = r'(?m)(^model = timm\.create_model\(")local-dir:[^"\n]+'  # as `training.make_denoiser` writes it
    text = re.sub(load, rf"\g<1>hf-hub:{repo_id}", text)
    try:
        data = ModelCard(text).data
    except Exception as e:  # yaml's and the client's own
        raise UserError(f"{folder / 'README.md'}: its metadata cannot be read: {first_line(e)}") from e
    if not getattr(data, "license", None):
        raise UserError(f"{folder / 'README.md'} names no license in its metadata")
    (temporary / "README.md").write_text(text, encoding="utf-8")
    return {name: (temporary if name == "README.md" else folder) / name for name in FILES}


def is_inside(folder: Path, name: str) -> bool:
    """Whether a folder has a file. Raises UserError for a link to what lies elsewhere and may be nobody's business."""
    file = folder / name
    if file.exists() and not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} is a link that leaves the folder; put the file itself there to publish it")
    return file.is_file()


def _own_card(folder: Path, repo_id: str, denoiser_only: bool) -> ModelCard:
    """A card for a model somebody trained: what its folder says, and no published results."""
    try:
        model = timm.create_model(f"local-dir:{folder}", device="meta")
    except Exception as e:  # timm's, ours, json's
        raise UserError(f"{folder} is not a model that can be loaded: {first_line(e)}") from e
    if not isinstance(model, Denoised):
        raise UserError(f"{folder} holds a model without a denoiser and has no README.md; write its card first")
    base = get_pretrained_cfg(str(model.backbone_name))
    variant = Variant(
        name=repo_id.split("/")[1],
        backbone=str(model.backbone_name),
        resolution=meant_size(model)[-1],
        license=base.license if base else None,
    )
    return card(variant, repo_id, denoiser_only, model)


def _hashes(path: Path) -> tuple[str, str]:
    """By what the Hub names a file, large and small."""
    return sha256(path), git_hash(path)
