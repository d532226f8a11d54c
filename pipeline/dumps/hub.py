"""`bld push` and `bld pull`: upload a dump or a student to a hub, download a dump. All resume when they are run again.

Shards are uploaded first and the summary last, so a repository with a summary is complete; of a student the weights
first, and its config last. Tokens are left to the hub
client, which reads them from the environment or its own log-in; no message of ours repeats one.
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
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.manifest import Manifest, read_json, shard_identity

_UPLOAD_FIRST = (dump_files.HUB_SHARD_FILES,)
_PLAN = (dump_files.MANIFEST, dump_files.PLAN_FILES)
_UPLOAD_LAST = (*_PLAN, dump_files.SUMMARY, dump_files.AUDIT, dump_files.RECIPE, dump_files.CARD, dump_files.VOCABULARY)
TRAINING = "training.json"  # of a student: its run's identity, with the checkpoint's step
_WEIGHTS = "*.safetensors"
_MODEL_LAST = (TRAINING, dump_files.CARD, "config.json")
HUB_SECONDS = 10.0  # timeout for asking whether something exists
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(dump: Path, repo: str, public: bool = False, revision: str | None = None, api: Any = None) -> str:
    """Upload a complete dump as a data set and return its address. Files that it already has are not sent again.

    Args:
        api: a huggingface_hub.HfApi, or a stand-in for one.
    Raises:
        ValueError: the dump is incomplete, the repository holds another dump, or the hub refuses.
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
        for patterns, what in ((_UPLOAD_FIRST, "shards"), (_UPLOAD_LAST, "manifest, summary and card")):
            api.upload_folder(
                repo_id=repo,
                folder_path=dump,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                commit_message=f"Add {what} of a dump",
            )
    return str(url)


def push_model(model: Path, repo: str, public: bool = False, revision: str | None = None, api: Any = None) -> str:
    """Upload an exported student with its card as a model and return its address.

    Args:
        model: its folder, with a `training.json` beside the card.
        api: as of `push`.
    Raises:
        ValueError: the folder is not an exported student, the repository holds another model, or the hub refuses.
    """
    _require_repo(repo)
    lacking = [name for name in (*_MODEL_LAST, dump_files.DISTILLED) if not (model / name).exists()]
    if lacking or not list(model.glob(_WEIGHTS)):
        raise ValueError(f"{model} is not an exported student: it has no {', '.join(lacking) or _WEIGHTS}")
    api = api or _api()
    with _hub_errors(f"pushing {model} to {repo}"):
        url = api.create_repo(repo, repo_type="model", private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="model", exist_ok=True)
        _refuse_another_model(model, repo, revision, api)
        names = sorted(path.name for path in model.iterdir() if path.is_file())
        others = [name for name in names if name not in _MODEL_LAST and not name.endswith(".safetensors")]
        for patterns, what in (([_WEIGHTS], "weights"), ([*others, *_MODEL_LAST], "tokenizer, config and card")):
            api.upload_folder(
                repo_id=repo,
                folder_path=model,
                repo_type="model",
                revision=revision,
                allow_patterns=patterns,
                commit_message=f"Add {what} of a student",
            )
    return str(url)


def _refuse_another_model(model: Path, repo: str, revision: str | None, api: Any) -> None:
    """Raise ValueError if the repository holds another model; a later checkpoint of the same run may follow."""
    with tempfile.TemporaryDirectory() as folder:
        patterns = [TRAINING, "config.json"]
        api.snapshot_download(repo, repo_type="model", revision=revision, local_dir=folder, allow_patterns=patterns)
        theirs, ours = Path(folder) / TRAINING, read_json(model / TRAINING)
        if theirs.exists():
            differences = identity_differences(*(_lasting(one) for one in (read_json(theirs), ours)))
        else:
            differences = ["it was not pushed from a run"] if (Path(folder) / "config.json").exists() else []
    if differences:
        raise ValueError(f"{repo} holds another model: {'; '.join(differences)}. Push to a new repository.")


def _lasting(training: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's identity that it keeps when it is trained on."""
    return {"student": training.get("student", {})}


def pull(repo: str, dump: Path, revision: str | None = None, api: Any = None) -> str:
    """Download a dump and check every shard against its summary. Returns a description of what was downloaded.

    Raises:
        ValueError: the folder holds another dump, the repository is not a complete dump, a file is corrupt, or the hub
            refuses.
    """
    _require_repo(repo)
    api = api or _api()
    with _hub_errors(f"pulling {repo} into {dump}"):
        info = api.repo_info(repo, repo_type="dataset", revision=revision)
        commit = info.sha  # all files are of this commit
        _refuse_outside(repo, [file.rfilename for file in info.siblings or ()])
        _refuse_foreign_folder(repo, commit, dump, api)
        # The summary last: an incomplete dump has none.
        others = [name for name in _UPLOAD_LAST if name != dump_files.SUMMARY]
        for patterns in ([*_UPLOAD_FIRST, *others], [dump_files.SUMMARY]):
            api.snapshot_download(repo, repo_type="dataset", revision=commit, local_dir=dump, allow_patterns=patterns)
    if not (dump / dump_files.MANIFEST).exists():
        raise ValueError(f"{repo} is not a dump: it has no manifest.json")
    require_complete(
        dump, "Delete the files named here and pull again; if that does not help, the dump must be pushed again."
    )
    shutil.rmtree(dump / ".cache", ignore_errors=True)  # the client's own records
    manifest = Manifest.load(dump)
    documents = sum(shard.num_documents for shard in manifest.shards)
    shards = count_of(len(manifest.shards), "shard")
    return f"{dump}: {count_of(documents, 'document')} in {shards}, checksums correct (commit {commit[:12]})"


def require_data_set(name: str, api: Any = None) -> None:
    """Raise ValueError at once if the hub has no data set of this name.

    The caller has already checked that there is no such file or folder. A library that loads data sets retries many
    times for one that does not exist; such a name is usually a mistyped folder.
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
            f"{nowhere}, and the hub shows you no data set of that name. Check the path, or log in (`hf auth login`)."
        ) from None
    except HfHubHTTPError:
        return  # loading it reports what is wrong
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{nowhere}, and the hub could not be asked for a data set of that name ({type(error).__name__}: "
            f"{without_secrets(str(error))}). Check the path, or the network and HF_ENDPOINT."
        ) from None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="bld")


def _require_repo(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise ValueError(f"{repo!r} does not name a repository on a hub; give OWNER/NAME")


def _remote_manifest(repo: str, revision: str | None, api: Any) -> Manifest | None:
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(
            repo, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=list(_PLAN)
        )
        return Manifest.load(Path(folder)) if (Path(folder) / dump_files.MANIFEST).exists() else None


def _refuse_another(dump: Path, repo: str, revision: str | None, api: Any) -> None:
    """Raise ValueError if the repository holds another dump, which this one would be mixed with.

    A dump that was extended may be pushed again.
    """
    theirs, ours = _remote_manifest(repo, revision, api), Manifest.load(dump)
    if theirs is None:
        return
    differences = identity_differences(shard_identity(theirs.identity), shard_identity(ours.identity))
    if not differences and theirs.shards[:-1] != ours.shards[: len(theirs.shards) - 1]:
        differences = ["its shards hold different documents"]
    if not differences and len(ours.shards) < len(theirs.shards):
        differences = [f"it has more shards: {len(theirs.shards)} there, {len(ours.shards)} here"]
    if differences:
        raise ValueError(f"{repo} holds another dump: {'; '.join(differences)}. Push to a new repository.")


def _refuse_foreign_folder(repo: str, commit: str, dump: Path, api: Any) -> None:
    if not dump.exists() or not any(dump.iterdir()):
        return
    if not (dump / dump_files.MANIFEST).exists():
        # An interrupted pull may have left shards only. We write into no other folder.
        known = {".cache", dump_files.SHARDS, *_UPLOAD_LAST}
        if all(path.name in known or dump_files.is_plan(path.name) for path in dump.iterdir()):
            return
        raise ValueError(f"{dump} is not empty and is not a dump; give a new folder")
    theirs, ours = _remote_manifest(repo, commit, api), Manifest.load(dump)
    if theirs != ours:
        differences = identity_differences({} if theirs is None else theirs.identity, ours.identity)
        difference = "; ".join(differences) or "its shards, counts or accepted engines differ"
        raise ValueError(f"{dump} holds another dump than {repo} ({difference}); give a new folder, or delete it")


def _refuse_outside(repo: str, names: list[str]) -> None:
    """Raise ValueError if a repository lists a file outside its folder; a hub may list anything."""
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/") or "\\" in name]
    if outside:
        raise ValueError(
            f"{repo} lists a file outside its folder, {outside[0]!r}: nothing was downloaded; do not use it"
        )


@contextmanager
def _hub_errors(doing: str) -> Iterator[None]:
    """Raise a hub's refusal or a network error as a ValueError: what was being done, and how to continue."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError:
        raise ValueError(
            f"{doing}: there is no such repository, or you have no access to it. "
            "Check the name, and log in (`hf auth login`)."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = (
            "Log in (`hf auth login`) or set HF_TOKEN, with write access."
            if status in (401, 403)
            else "Run the same command again: it resumes."
        )
        raise ValueError(f"{doing}: the hub refused ({status}: {without_secrets(str(error))}). {hint}") from None
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{doing}: {type(error).__name__}: {without_secrets(str(error))}. "
            "Check the network and HF_ENDPOINT, and run the same command again: it resumes."
        ) from None


def without_secrets(text: str) -> str:
    """Return the text on one line, without tokens: those in the environment, and anything that looks like one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return " ".join(re.sub(r"hf_[A-Za-z0-9]{6,}|(?<=://)[^/@\s]+@|(?i:(?<=bearer )\S+)", "***", text).split())
