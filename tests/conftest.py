"""Settings for the whole suite; a room's fixtures stand in that room's folder."""

from __future__ import annotations

import os

import hypothesis
import pytest

from tests.beside import Beside

# A slow machine is no failure (pytest-timeout sees to hangs), and a failing example prints how to run it again.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
# CI draws the same examples every time, so that a red run means a change and not a lucky draw.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Beside())
