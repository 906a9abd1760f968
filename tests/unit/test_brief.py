"""What the output plugin does beside printing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# What no filter imports once the plugin is there: workers are forked from this state.
MISSING = """
import importlib, sys
from pathlib import Path
from ansible_collections.stepladder.core.plugins.callback import quiet
quiet.CallbackModule()
before = set(sys.modules)
for path in Path("plugins/filter").glob("*.py"):
    importlib.import_module(f"ansible_collections.stepladder.core.plugins.filter.{path.stem}")
print(sorted(name for name in sys.modules.keys() - before if name.partition(".")[0] in ("stepladder", "pydantic")))
"""


def test_workers_import_nothing_of_the_brain() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
