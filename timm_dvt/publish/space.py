"""Publishing the page as a Space of the Hub: a folder of three files, and this package beside them."""

from importlib import resources
from pathlib import Path

from huggingface_hub import HfApi, RepoCard

from timm_dvt.errors import UserError, first_line
from timm_dvt.publish.push import check_id, commit, files_there, hub_errors, is_inside

FOLDER = "hub_cards/space"
FILES = ("README.md", "requirements.txt", "app.py")


def push_space(
    folder: str, repo_id: str, private: bool = False, create_pr: bool = False, dry_run: bool = False
) -> bool:
    """Publish the page as a Space; files it has already, by their hashes, are left out.

    Args:
        folder: one that holds `FILES`, as hub_cards/space does.
        repo_id, private, create_pr, dry_run: as for `timm_dvt.publish.push.push`.

    Returns:
        Whether there was anything to publish.

    Raises:
        UserError: the folder, the repo or the account cannot be used.
    """
    check_id(repo_id)
    files = gather(Path(folder))
    api = HfApi()
    with hub_errors(repo_id):
        there = files_there(api, repo_id, private, create_pr, "space")
        if not dry_run:
            api.whoami()
    return commit(api, repo_id, files, there, "Publish the page", private, create_pr, dry_run, "space")


def gather(folder: Path) -> dict[str, Path]:
    """What a Space is made of, by its name in the repo: the folder's files and the package's. Raises UserError."""
    for name in FILES:
        if not is_inside(folder, name):
            raise UserError(f"{folder} has no {name}; the folder of a Space holds {', '.join(FILES)}, as {FOLDER} does")
    try:
        sdk = RepoCard.load(folder / "README.md").data.get("sdk")
    except Exception as e:  # yaml's and the client's own
        raise UserError(f"{folder / 'README.md'}: its metadata cannot be read: {first_line(e)}") from e
    if sdk != "gradio":
        raise UserError(f"{folder / 'README.md'} says sdk: {sdk}; the page is one of Gradio")
    package = Path(str(resources.files("timm_dvt")))
    package_files = [path for path in sorted(package.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    beside = {path.relative_to(package.parent).as_posix(): path for path in package_files}
    return {name: folder / name for name in FILES} | beside
