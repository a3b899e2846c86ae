"""The page's own files, as they lie in the package."""

from __future__ import annotations

import hashlib
import importlib.resources

MIME = {".js": "text/javascript", ".css": "text/css"}


def static_files() -> dict[str, bytes]:
    """Name -> content. All there is to serve is listed here once; no request reaches the file system."""
    folder = importlib.resources.files("trainrt.plugin") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(tuple(MIME))}


def digest() -> str:
    """Another one for any change of the page's files."""
    return hashlib.sha256(repr(sorted(static_files().items())).encode()).hexdigest()[:12]
