"""What native libraries print while TensorFlow loads, kept off a command's page."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def without_banners() -> Iterator[None]:
    """They write to descriptor 2, past every log level. It is shown only if what runs inside fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as banners:
        os.dup2(banners.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            banners.seek(0)
            os.write(kept, banners.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def load_tensorflow() -> None:
    """Imports it, and says of it what a command's user has to know: nothing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with without_banners():
        import keras  # noqa: F401
        import tensorflow  # noqa: F401
