"""The page's own files, as they lie in the package."""

from __future__ import annotations

import importlib.resources

MIME = {".js": "text/javascript", ".css": "text/css"}


def static_files() -> dict[str, bytes]:
    """Name -> content. All there is to serve is listed here once; no request reaches the file system."""
    folder = importlib.resources.files("trainrt.plugin") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(tuple(MIME))}
