"""What TensorBoard imports at its start. One error here and no TensorBoard comes up, so nothing here can fail."""

from __future__ import annotations

import logging
import threading

from tensorboard.plugins import base_plugin

_SAMPLES = "samples_per_plugin"


class TrainrtLoader(base_plugin.TBLoader):
    """Loads the plugin late, and never raises."""

    def fix_flags(self, flags):
        """Says how much of the record TensorBoard itself keeps in memory, unless the user did.

        Where the event files are at hand they are read from disk, so one sample of a tag is enough to show that there
        is a record. Elsewhere TensorBoard's copy is all there is: it keeps everything (0), not 10 samples by chance.
        """
        try:
            from trainrt.plugin.sources import local

            samples = dict(getattr(flags, _SAMPLES, None) or {})
            samples.setdefault("trainrt", 1 if local(flags.logdir, getattr(flags, "logdir_spec", "")) else 0)
            setattr(flags, _SAMPLES, samples)
        except Exception:
            logging.getLogger(__name__).warning("trainrt left TensorBoard's flags as they were.", exc_info=True)

    def load(self, context):
        """The plugin, or None with a warning when it cannot be loaded."""
        try:
            from trainrt.plugin.app import TrainrtPlugin
            from trainrt.plugin.sources import local

            plugin = TrainrtPlugin(context)
            if local(getattr(context.flags, "logdir", ""), getattr(context.flags, "logdir_spec", "")):
                threading.Thread(target=plugin.is_active, daemon=True).start()  # which cannot raise
            return plugin
        except Exception:
            logging.getLogger(__name__).warning("TensorBoard goes without trainrt's page.", exc_info=True)
            return None
