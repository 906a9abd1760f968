from __future__ import annotations

from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress."""
