"""Say how many inputs were tried."""

from typing import Any

from tests.fuzz.profiles import tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if tried:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(tried.items()))
        terminalreporter.write_line(f"fuzz: {tried.total()} inputs: {counts}")
