from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction

LIVE = "STEPLADDER_PROGRESS"


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress.

    Where the environment names a folder in STEPLADDER_PROGRESS, what the job says of itself goes there, a file for each
    node: `stepladder.weights_live` draws all of them.
    """

    def _foresee(self, arguments: dict[str, Any]) -> dict[str, Any]:
        # It would read every byte without a word; the job reads them and says how far it is.
        if arguments.get("verify") == "full" and not self._task.check_mode:
            return {"changed": True}
        return super()._foresee(arguments)

    def _is_needed(self, foreseen: dict[str, Any]) -> bool:
        # A node that has everything may still have to pass it on.
        return bool(foreseen.get("changed") or self._task.args.get("spread"))

    def _heard(self, data: str) -> None:
        folder = os.environ.get(LIVE)
        if folder:
            place = Path(folder) / self._name.partition(" | ")[0]
            fresh = place.with_suffix(".new")
            fresh.write_text(json.dumps(json.loads(data)))
            fresh.replace(place)
