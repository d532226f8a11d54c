"""Requirements that an option of the recipe has of this machine: a package, a GPU."""

from importlib import metadata

from pipeline.runtime.devices import computes_on_gpu


def require_package(option: str, package: str, install: str, otherwise: str) -> None:
    """Raise ValueError if an option's package is not installed.

    Args:
        option: key and value, as `train.optimizer: adamw_8bit`.
        package: its name on a package index.
        install: what installs it.
        otherwise: the setting that does without.
    """
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{option} needs the package {package}, which is not installed: run `{install}` in this environment, or "
            f"set {otherwise}"
        ) from error


def require_gpu(option: str, otherwise: str) -> None:
    """Raise ValueError if torch can compute on no GPU here.

    Args:
        option: key and value.
        otherwise: the setting that does without.
    """
    if not computes_on_gpu():
        raise ValueError(
            f"{option} needs an NVIDIA GPU, and torch sees none on this machine: set {otherwise}, or run it where "
            "there is one"
        )
