"""Lazy lookup of `package.module:Name` paths, so that a table of names imports nothing until one is used."""

import importlib


def load(path: str) -> object:
    """The object at `package.module:Name`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
