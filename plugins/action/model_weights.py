from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction

LIVE = "STEPLADDER_PROGRESS"


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress.

    Where the environment names a folder in STEPLADDER_PROGRESS, what the job says of itself goes there, a file for each
    node: `stepladder.weights_live` draws all of them. The argument `missing` says that something is known to
    be missing.
    """

    def _foresee(self, arguments: dict[str, Any]) -> dict[str, Any]:
        missing = boolean(arguments.pop("missing", False))
        # A full check would read every byte without a word; the job reads them and says how far it is. What was just
        # seen to be missing need not be looked for again, and a node that has everything may have to pass it on.
        if not self._task.check_mode and (arguments.get("verify") == "full" or missing or arguments.get("spread")):
            return {"changed": True}
        return super()._foresee(arguments)

    def _heard(self, data: str) -> None:
        folder = os.environ.get(LIVE)
        if folder:
            place = Path(folder) / self._name.partition(" | ")[0]
            fresh = place.with_name(f"{place.name}.new")
            fresh.write_text(json.dumps(json.loads(data)))
            fresh.replace(place)
