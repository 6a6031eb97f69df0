"""Models sent to Hugging Face's hub: in one commit, after a look at whether it may be made."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.files.hub import Absent, Repo, asked, parse
from converters.files.reader import INDEX
from vfjax import InputError
from vfjax.atomic import STORES

if TYPE_CHECKING:
    pass

WHERE = "push_to_hub"

STALE = (".safetensors", ".bin", INDEX)
"""What names of weights end in that a new model's must not stand beside."""


def check_push(name: str, out: str | Path, private: bool | None = None) -> Repo:
    """The repository that a name means, if this login may write to it; nothing is made.

    Args:
        name: `org/name`.
        out: the folder that will be sent.
        private: as of `push`.

    Raises:
        InputError: no such form of a name; no login, or one that may not write there; a public
            repository where a private one is wanted; no network.
    """
    from huggingface_hub import HfApi, constants, get_token

    repo = parse(name)
    if repo is None or repo.revision is not None:
        raise InputError(
            WHERE, found=repr(name), expected="'org/name'", fix="name a repository of models"
        )
    if str(out).startswith(tuple(STORES)):
        raise InputError(
            WHERE,
            found=f"a folder in a bucket, {out}, to send",
            expected="one on a disk, as the hub's client reads files",
            fix=f"write it there; or leave this out, copy it from there, and hf upload {repo} COPY",
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(WHERE, found="HF_HUB_OFFLINE set", expected="a network", fix="unset it")
    if get_token() is None:
        raise InputError(
            WHERE,
            found="no login",
            expected="a token that may write",
            fix=f"make one at {constants.ENDPOINT}/settings/tokens, then run hf auth login",
        )
    api = HfApi(library_name="vfjax")
    who = asked(repo, WHERE, api.whoami)
    _check_token(repo, who)
    try:
        found = asked(repo, WHERE, lambda: api.model_info(repo.name))
        asked(repo, WHERE, lambda: api.auth_check(repo.name, write=True))
    except Absent:
        _check_namespace(repo, who)
        return repo
    if private and not found.private:
        raise InputError(
            WHERE,
            found=f"{repo}, which is public",
            expected="a private repository",
            fix=f"make it private at {constants.ENDPOINT}/{repo}/settings, or name another",
        )
    return repo


def _check_token(repo: Repo, who: Mapping[str, Any]) -> None:
    """Raises InputError if a token may read alone, or may not write there."""
    from huggingface_hub import constants

    token = (who.get("auth") or {}).get("accessToken") or {}
    namespace = repo.name.split("/")[0]
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        may = any(
            (scope.get("entity") or {}).get("name") in (namespace, repo.name)
            and any(x.startswith("repo.") and x.endswith("write") for x in scope["permissions"])
            for scope in scopes
        )
    else:
        may = token.get("role") != "read"
    if not may:
        raise InputError(
            WHERE,
            found=f"a token of {who.get('name')} that may not write to {repo}",
            expected="one that may",
            fix=f"make one at {constants.ENDPOINT}/settings/tokens, then run hf auth login",
        )


def _check_namespace(repo: Repo, who: Mapping[str, Any]) -> None:
    """Raises InputError if an account may make no repository there."""
    namespace = repo.name.split("/")[0]
    roles = {str(who.get("name")): "admin"}
    roles |= {org["name"]: org.get("roleInOrg", "write") for org in who.get("orgs") or []}
    if roles.get(namespace, "read") == "read":
        may = ", ".join(name for name, role in roles.items() if role != "read")
        raise InputError(
            WHERE,
            found=f"{namespace}, where {who.get('name')} may make no repository",
            expected=may,
            fix="name one of them, or ask to be let in",
        )


def push(folder: Path, repo: Repo, private: bool | None = None) -> str:
    """Sends a whole folder in one commit: who reads meanwhile has what was there before.

    Weights that were there and are not in the folder are removed with it: readers would take them.

    Args:
        folder: a model's.
        repo: made if it is not there.
        private: whether it is made so that others do not see it; None: as the account has it.

    Returns:
        Its page.

    Raises:
        InputError: it is refused, or breaks off; what was uploaded is not asked for again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    again = f"{folder} is whole: hf upload {repo} {folder}"
    api = HfApi(library_name="vfjax")
    files = {x.relative_to(folder).as_posix(): x for x in folder.rglob("*") if x.is_file()}

    def send() -> str:
        made = api.create_repo(repo.name, private=private, exist_ok=True)
        there = api.list_repo_files(repo.name)
        steps: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(path_in_repo=name)
            for name in there
            if name.endswith(STALE) and name not in files
        ]
        steps += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in sorted(files.items())
        ]
        api.create_commit(repo.name, operations=steps, commit_message="Upload by vfjax")
        return str(made)

    return asked(repo, WHERE, send, again)
