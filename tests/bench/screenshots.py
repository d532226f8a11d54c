"""The pictures in the README: `bld inspect --html` and `bld report` in headless Chromium, in light and in dark.

    .venv/bin/python -m tests.bench.screenshots [--dump runs/demo/dump] [--run runs/demo/student]
        [--out pipeline/images]

After `make demo`. Debian has the browser as `chromium`; nothing is loaded from anywhere. Pictures have few colours, so
that each is some 30 kB.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = {"dark": 0, "light": 1}  # Blink's preferredColorScheme
MAX_BYTES = 150_000


def find_browser() -> str:
    """Find the browser. Raises ValueError if there is none."""
    for name in BROWSERS:
        if shutil.which(name):
            return name
    raise ValueError(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")


def take(browser: str, address: str, size: tuple[int, int], scheme: str, out: Path) -> None:
    """Draw the top of a page, `size` pixels. Raises ValueError if the picture is too large for a README."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
        look = [
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--window-size={size[0]},{size[1] + 400}",
        ]  # room: a page that fits is not scrolled to its mark
        command = [browser, *flags, *look, f"--user-data-dir={folder}/profile", f"--screenshot={raw}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(raw) as picture:
            picture.convert("RGB").crop((0, 0, *size)).quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)
    if out.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{out} has {out.stat().st_size} bytes, more than {MAX_BYTES}; take a smaller part of the page"
        )


def main(
    dump: Annotated[Path, typer.Option(help="Whose document is drawn.")] = Path("runs/demo/dump"),
    run: Annotated[list[Path] | None, typer.Option(help="Runs to report on; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("pipeline/images"),
    doc: Annotated[str, typer.Option(help="The document.")] = "1",
    byte: Annotated[int, typer.Option(help="The byte whose distribution is shown.")] = 297,
) -> None:
    """Write inspect-light.png, inspect-dark.png, report-light.png and report-dark.png."""
    browser = find_browser()
    runs = run or [Path("runs/demo/student")]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inspect, report = Path(folder, "inspect.html"), Path(folder, "report.html")
        bld = [sys.executable, "-m", "pipeline", "--quiet"]
        subprocess.run([*bld, "inspect", str(dump), "--doc", doc, "--html", str(inspect)], check=True)
        subprocess.run([*bld, "report", *map(str, runs), "--out", str(report)], check=True)
        for scheme in SCHEMES:
            take(browser, f"{inspect.as_uri()}#b{byte}", (1000, 660), scheme, out / f"inspect-{scheme}.png")
            take(browser, report.as_uri(), (1000, 840), scheme, out / f"report-{scheme}.png")
    for path in sorted(out.glob("*.png")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
