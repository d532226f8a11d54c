"""One source archive from the package index, as it lies there: `python -m pipeline.sources.pypi_sdist NAME VERSION
SHA256 FOLDER`.

`pip download` would unpack a source archive and run its build backend, to ask for metadata that nobody needs here. What
is asked of pip instead is what it knows best: where archives lie (its indexes, links, certificates, proxies, log-ins),
and to send one over. pip promises no interface for that, hence a process of its own and an error that says so; the
caller checks the hash.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Put the archive into the folder, under its own name. Exits with a message where no index has it."""
    name, version, sha256, folder = arguments
    from pip import __version__ as pip_version

    try:
        from pip._internal.commands import create_command

        command: Any = create_command("download")
        options, _ = command.parse_args(["--no-binary=:all:", "--no-input"])
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session, ignore_requires_python=True)
            links = [found.link for found in finder.find_all_candidates(name) if str(found.version) == version]
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
