"""Download of one source archive from the package index, unchanged and without running its code.

Run as `python -m pipeline.sources.pypi_sdist NAME VERSION SHA256 FOLDER`. `pip download` would unpack a source archive
and run its build backend, for metadata that is not needed here. Only pip's knowledge of archives is used instead: its
indexes, links, certificates, proxies and log-ins. pip promises no interface for that, hence a separate process and an
error that says so. The caller checks the hash.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Download the archive into the folder, under its own name. Exits with a message if no index has it."""
    name, version, sha256, folder = arguments
    from pip import __version__ as pip_version

    try:
        from pip._internal.commands import create_command

        command: Any = create_command("download")
        options, _ = command.parse_args(["--no-binary=:all:", "--no-input"])
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session, ignore_requires_python=True)
            links = [
                candidate.link for candidate in finder.find_all_candidates(name) if str(candidate.version) == version
            ]
            chosen = next((link for link in links if link.hash in (sha256, None)), None)
            if chosen is None:
                raise SystemExit(f"no index holds a source archive {name}=={version} of sha256 {sha256}")
            with session.get(chosen.url_without_fragment, stream=True) as answer:
                answer.raise_for_status()
                _write(answer.raw, Path(folder) / chosen.filename)
    except (ImportError, AttributeError, TypeError) as error:
        raise SystemExit(f"pip {pip_version} cannot be asked for a source archive: {error!r}") from error


def _write(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        while chunk := content.read(1 << 20):
            file.write(chunk)


if __name__ == "__main__":
    main(sys.argv[1:])
