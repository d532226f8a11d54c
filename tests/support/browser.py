"""Pages opened in headless Chromium, if it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser() -> str:
    for name in BROWSERS:
        if shutil.which(name):
            return name
    pytest.skip(f"no browser to open the page with: none of {', '.join(BROWSERS)} is installed")


def open_page(browser: str, page: Path, mark: str, profile: Path) -> tuple[str, str]:
    """Return the document after its script has run, and the browser's errors."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    command = [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}#{mark}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
