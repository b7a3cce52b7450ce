"""Errors of the library, on the one tree of `storage/errors.py`."""

from __future__ import annotations

from storage.errors import TitanmemError


class ModelFolderError(TitanmemError):
    """A model's folder lacks a file, or a file in it cannot be used; the message names folder and file."""


class ChatTemplateError(TitanmemError):
    """A model's chat template does not compile, or refuses a conversation."""
