"""Figures for Prometheus, read as Prometheus does: over HTTP."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.runtime import metrics
from pipeline.runtime.progress import Progress


def scraped(address: str) -> dict[str, float]:
    """Return the value of each sample, its labels after its name."""
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def test_work_done_is_counted_and_served_and_the_port_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.VARIABLE, "0")  # any free port
    with metrics.served() as address:
        assert address is not None and address.startswith("http://127.0.0.1:")
        before = scraped(address)
        with Progress(3, 100) as progress:
            progress.update(documents=2, text_bytes=60, tokens=20, stored_bytes=300)
        metrics.figures().missing.labels("tail").inc(1.5)
        metrics.set_train(7, {"loss": 2.5})
        after = scraped(address)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained["bld_documents_total"] == 2 and gained["bld_text_bytes_total"] == 60
    assert gained["bld_stored_bytes_total"] == 300 and gained["bld_missing_mass_total tail"] == 1.5
    assert after["bld_planned_text_bytes"] == 100 and after["bld_failures_total engine"] >= 0
    assert after["bld_train_step"] == 7 and after["bld_train loss"] == 2.5
    with pytest.raises(OSError):
        scraped(address)


def test_nothing_is_served_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.VARIABLE, raising=False)
    with metrics.served() as address:
        assert address is None


def test_a_port_that_is_taken_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv(metrics.VARIABLE, str(taken.getsockname()[1]))
        with pytest.raises(OSError, match="give another port"), metrics.served():
            pass


@pytest.mark.parametrize(
    ("text", "address"),
    [("9400", ("127.0.0.1", 9400)), ("0.0.0.0:9400", ("0.0.0.0", 9400)), ("[::1]:9400", ("::1", 9400))],
)
def test_an_address_is_a_port_with_or_without_a_host(text: str, address: tuple[str, int]) -> None:
    assert metrics.parse_address(text) == address


@pytest.mark.parametrize("text", ["", "here", "host:", "1:70000"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        metrics.parse_address(text)


def test_an_address_of_the_environment_that_is_none_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.VARIABLE, "here:http")
    with pytest.raises(ValueError, match=r"\(BLD_METRICS\) is 'here:http': give PORT or HOST:PORT"), metrics.served():
        pass
