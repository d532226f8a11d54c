"""`bld push` and `bld pull`: a dump to a hub and back. Both resume when they are run again.

Shards go up first and the summary last, so that what a repository lists as complete is. A token is the hub client's
business: it takes it from the environment or from its own log-in, and no message of ours repeats one.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.identity import identity_differences
from pipeline.dumps.card import write_card
from pipeline.dumps.completeness import require_complete
from schemas import dump_files
from schemas.manifest import Manifest, shard_identity

_FIRST = (dump_files.SHARD_FILES,)
_LAST = (dump_files.MANIFEST, dump_files.SUMMARY, dump_files.AUDIT, dump_files.RECIPE, dump_files.CARD)
HUB_SECONDS = 10.0  # to wait for an answer to whether something is there
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(dump: Path, repo: str, public: bool = False, revision: str | None = None, api: Any = None) -> str:
    """Upload a complete dump as a data set; returns its address. Files that are there already are not sent again.

    Args:
        api: a huggingface_hub.HfApi, or what stands in for one.
    Raises:
        ValueError: the dump is not complete, the repository holds another one, or the hub refuses.
    """
    _require_repo(repo)
    require_complete(dump, "Run `bld teacher` again to finish it, then push.")
    write_card(dump)
    api = api or _api()
    with _hub_errors(f"pushing {dump} to {repo}"):
        url = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
        _refuse_another(dump, repo, revision, api)
        for patterns, what in ((_FIRST, "shards"), (_LAST, "manifest, summary and card")):
            api.upload_folder(
                repo_id=repo,
                folder_path=dump,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                commit_message=f"Add {what} of a dump",
            )
    return str(url)


def pull(repo: str, dump: Path, revision: str | None = None, api: Any = None) -> str:
    """Download a dump and check every shard against its summary; returns what was got, in words.

    Raises:
        ValueError: the folder holds another dump, the repository is not a whole dump, a file is spoiled, or the hub
            refuses.
    """
    _require_repo(repo)
    api = api or _api()
    with _hub_errors(f"pulling {repo} into {dump}"):
        found = api.repo_info(repo, repo_type="dataset", revision=revision)
        commit = found.sha  # all files of one moment
        _refuse_outside(repo, [file.rfilename for file in found.siblings or ()])
        _refuse_foreign_folder(repo, commit, dump, api)
        # The summary last: a dump that is not all there has none.
        for patterns in ([*_FIRST, *(name for name in _LAST if name != dump_files.SUMMARY)], [dump_files.SUMMARY]):
            api.snapshot_download(repo, repo_type="dataset", revision=commit, local_dir=dump, allow_patterns=patterns)
    if not (dump / dump_files.MANIFEST).exists():
        raise ValueError(f"{repo} is not a dump: it holds no manifest.json")
    require_complete(
        dump, "Delete the files named here and pull again; if that does not help, the dump must be pushed again."
    )
    shutil.rmtree(dump / ".cache", ignore_errors=True)  # the client's book-keeping
    manifest = Manifest.load(dump)
    documents = sum(shard.num_documents for shard in manifest.shards)
    return f"{dump}: {documents} documents in {len(manifest.shards)} shards, checksums good (commit {commit[:12]})"


def require_data_set(name: str, api: Any = None) -> None:
    """Raises ValueError at once for a name of which there is neither a file or folder (which is known by then) nor a
    data set on the hub.

    A library that loads data sets asks again and again for one that is not there; most often such a name is a mistyped
    folder.
    """
    from httpx2 import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return  # it may be in the cache
    nowhere = f"there is no file or folder {name!r} (from {Path.cwd()})"
    try:
        (api or _api()).dataset_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise ValueError(
            f"{nowhere}, and no data set of that name on the hub that you may see. Check the path, or log in (`hf auth login`)."
        ) from None
    except HfHubHTTPError:
        return  # whoever loads it says what is wrong
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{nowhere}, and the hub cannot be asked for a data set of that name ({type(error).__name__}: "
            f"{without_secrets(str(error))}). Check the path, or the network and HF_ENDPOINT."
        ) from None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="bld")


def _require_repo(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise ValueError(f"{repo!r} does not name a data set on a hub; give OWNER/NAME")


def _remote_manifest(repo: str, revision: str | None, api: Any) -> Manifest | None:
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(
            repo, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=[dump_files.MANIFEST]
        )
        return Manifest.load(Path(folder)) if (Path(folder) / dump_files.MANIFEST).exists() else None


def _refuse_another(dump: Path, repo: str, revision: str | None, api: Any) -> None:
    """A dump may be pushed again, longer; another one would be left mixed with it."""
    theirs, ours = _remote_manifest(repo, revision, api), Manifest.load(dump)
    if theirs is None:
        return
    differences = identity_differences(shard_identity(theirs.identity), shard_identity(ours.identity))
    if not differences and theirs.shards[:-1] != ours.shards[: len(theirs.shards) - 1]:
        differences = ["its shards hold other documents"]
    if not differences and len(ours.shards) < len(theirs.shards):
        differences = [f"it has more shards: {len(theirs.shards)} there, {len(ours.shards)} here"]
    if differences:
        raise ValueError(f"{repo} holds another dump: {'; '.join(differences)}. Push to a new repository.")


def _refuse_foreign_folder(repo: str, commit: str, dump: Path, api: Any) -> None:
    if not dump.exists() or not any(dump.iterdir()):
        return
    if not (dump / dump_files.MANIFEST).exists():
        # A pull that was cut off may have left shards only; anything else is not ours to write into.
        if {path.name for path in dump.iterdir()} <= {".cache", dump_files.SHARDS, *_LAST}:
            return
        raise ValueError(f"{dump} is not empty and is not a dump; give a new folder")
    theirs, ours = _remote_manifest(repo, commit, api), Manifest.load(dump)
    if theirs != ours:
        differences = identity_differences({} if theirs is None else theirs.identity, ours.identity)
        said = "; ".join(differences) or "its shards, counts or accepted engines are others"
        raise ValueError(f"{dump} holds another dump than {repo} ({said}); give a new folder, or delete that one")


def _refuse_outside(repo: str, names: list[str]) -> None:
    """A hub, or one that HF_ENDPOINT names, may list what it likes."""
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/") or "\\" in name]
    if outside:
        raise ValueError(
            f"{repo} lists a file outside its folder, {outside[0]!r}: nothing of it was fetched; do not use it"
        )


@contextmanager
def _hub_errors(doing: str) -> Iterator[None]:
    """A hub's refusal, or a network that is not there, as one line: what was being done, and how to go on."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError:
        raise ValueError(
            f"{doing}: there is no such data set, or you may not see it. Check the name, and log in (`hf auth login`)."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = (
            "Log in (`hf auth login`) or set HF_TOKEN, with the right to write."
            if status in (401, 403)
            else "Run the same command again: it resumes."
        )
        raise ValueError(f"{doing}: the hub refused ({status}: {without_secrets(str(error))}). {hint}") from None
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{doing}: {type(error).__name__}: {without_secrets(str(error))}. Check the network and HF_ENDPOINT, and run the same "
            "command again: it resumes."
        ) from None


def without_secrets(text: str) -> str:
    """The text on one line, less any token: what looks like one, and what the environment holds as one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return " ".join(re.sub(r"hf_[A-Za-z0-9]{6,}|(?<=://)[^/@\s]+@|(?i:(?<=bearer )\S+)", "***", text).split())
