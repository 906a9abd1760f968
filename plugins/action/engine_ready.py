from __future__ import annotations

import time
from typing import Any

from ansible import constants as C  # noqa: N812 - Ansible's own name for it
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import intervals
from ansible_collections.stepladder.core.plugins.plugin_utils.ranks import Together
from ansible_collections.stepladder.core.plugins.plugin_utils.readiness import Readiness
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

UNREACHABLE_FOR = 60.0
# Longer than the engines' own deadlines for what they wait for, whose messages say more: torch.distributed gives up its
# store after 300 s and NCCL after 600 s.
PROGRESS_DEADLINE = 900


class ActionModule(ActionBase):
    """Looks with engine_state again and again until all processes are ready, or one is to blame for the failure."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        variables = task_vars or {}
        host = variables.get("inventory_hostname", "?")
        arguments = dict(self._task.args)
        wait = Readiness(
            deadline=_number(arguments.pop("deadline", None), "deadline", smallest=1),
            allowed_restarts=_number(arguments.pop("allowed_restarts", 1), "allowed_restarts", smallest=0),
            progress_deadline=_number(
                arguments.pop("progress_deadline", PROGRESS_DEADLINE), "progress_deadline", smallest=0
            ),
        )
        together = Together(C.DEFAULT_LOCAL_TMP, arguments.pop("ranks", None) or [], host)
        started = reached = time.monotonic()
        try:
            for interval in intervals(first=2.0):
                try:
                    looked = self._look(arguments, wait, variables)
                    reached = time.monotonic()
                except AnsibleConnectionFailure:
                    if time.monotonic() - reached > UNREACHABLE_FOR:
                        together.fail()
                        raise
                    show(f"  {host} | cannot be reached, trying again for {UNREACHABLE_FOR:.0f} s")
                    time.sleep(interval)
                    continue
                elapsed = time.monotonic() - started
                answer = {**result, "changed": False, "seconds": round(elapsed, 1), "states": looked.get("states", [])}
                if looked.get("failed"):
                    together.fail()
                    return {**answer, **looked}
                if self._task.check_mode:
                    return answer
                for line in wait.lines(answer["states"], elapsed):
                    show(f"  {host} | {line}")
                if wait.worked(answer["states"], elapsed):
                    together.worked()
                verdict = wait.verdict(answer["states"], elapsed, together.idle())
                if verdict == "":
                    return answer
                if verdict:
                    together.fail()
                    return {**answer, "failed": True, "msg": verdict}
                if culprit := together.to_blame():
                    return {**answer, "failed": True, "msg": f"ended the wait because {culprit} failed, see there"}
                time.sleep(min(interval, max(0.1, wait.deadline - elapsed)))
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        raise AssertionError("intervals never end")

    def _look(self, arguments: dict[str, Any], wait: Readiness, variables: dict[str, Any]) -> dict[str, Any]:
        processes = arguments.get("processes")
        if isinstance(processes, list) and all(isinstance(process, dict) for process in processes):
            known = [{**p, "ever_ready": p.get("ever_ready") or wait.ever_ready(p.get("name", ""))} for p in processes]
            arguments = {**arguments, "processes": known}
        answer: dict[str, Any] = self._execute_module(
            module_name="stepladder.core.engine_state", module_args=arguments, task_vars=variables
        )
        return answer


def _number(value: object, name: str, smallest: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = smallest - 1
    if number < smallest:
        raise AnsibleActionFail(f"{name} is {value!r}: give a whole number, {smallest} or greater")
    return number
