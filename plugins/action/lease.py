"""`stepladder.core.lease`: says who runs this, takes over from runs that are gone, and keeps the lease alive."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.stepladder.core.plugins.module_utils.lease import renewal
from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run

# Several renewals may be lost before a lease expires: its ttl is 120 s.
RENEW_SECONDS = 10.0
RENEWAL_LOST = 3
# The module's own, where the task names none.
TTL_SECONDS = 120.0


class ActionModule(ActionBase):
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        main = os.getppid()
        living = this_run.controller(main)
        self._mine = {
            **self._task.args,
            "who": this_run.who(),
            "origin": socket.gethostname(),
            "run": this_run.mark(living),
            "controller": living,
        }
        if self._mine["state"] == "taken" and not self._task.check_mode:
            return result | self._take(main, variables)
        answer = self._call(self._mine, variables)
        if self._mine["state"] == "logged" and not self._mine.get("outcome") and not self._task.check_mode:
            answer["stepladder"] = self._begun()
        return result | answer

    def _take(self, main: int, variables: dict[str, Any]) -> dict[str, Any]:
        """Take the node's lease, unless an earlier node's was not to be had: all or none.

        The task takes one node after the other (throttle), in the play's order.
        """
        refused = this_run.refused_file()
        if refused.exists():
            return {"changed": False, "taken": False, "not_asked": True}
        answer: dict[str, Any] = {}
        try:
            answer = self._call(self._mine, variables)
            holder = answer.get("holder") or {}
            if not answer.get("taken") and this_run.is_gone(holder.get("controller") or {}):
                answer = self._call({**self._mine, "supersede": holder["run"]}, variables)
        finally:
            if not answer.get("taken"):
                refused.parent.mkdir(parents=True, exist_ok=True)
                refused.touch()
        if answer.get("taken"):
            self._keep(main, variables)
            answer["stepladder"] = self._begun()
        return answer

    def _begun(self) -> dict[str, Any]:
        """What the callback writes into the controller's log."""
        return {"audit": {name: self._mine.get(name, "") for name in ("verb", "why", "deployment", "plan_id")}}

    def _call(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="stepladder.core.lease", module_args=arguments, task_vars=variables
        )
        return answer

    def _keep(self, main: int, variables: dict[str, Any]) -> None:
        """Leave a process behind that renews the lease while the run lives, and gives it back when it has ended.

        It is a grandchild of this worker, in a session of its own, so that neither Ansible nor a Ctrl-C ends it; it
        ends by itself with the run.
        """
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        try:
            os.setsid()
            if os.fork() == 0:
                self._detach()
                self._renew(main, variables)
        finally:
            os._exit(0)

    @staticmethod
    def _detach() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # Nothing is said from here: Ansible's queue for output is not this process's any more.
        Display().verbosity = 0

    def _renew(self, main: int, variables: dict[str, Any]) -> None:
        place, mark = self._mine["state_directory"], self._mine["run"]
        while self._lives(main):
            # A connection that fails once fails one renewal: the next is due long before the lease expires.
            with contextlib.suppress(AnsibleError):
                answer = self._low_level_execute_command(renewal(place, mark, _doing()))
                if answer.get("rc") == RENEWAL_LOST:
                    return
        self._give_back(variables)

    def _give_back(self, variables: dict[str, Any]) -> None:
        """Given back by the end of the run already, or not, where the run failed or was killed.

        It is tried until the lease has expired by itself.
        """
        given_up = time.monotonic() + float(self._mine.get("ttl", TTL_SECONDS))
        Path(constants.DEFAULT_LOCAL_TMP).mkdir(parents=True, exist_ok=True)
        while True:
            # The one that the task had was removed at its end.
            self._connection._shell.tmpdir = None
            with contextlib.suppress(AnsibleError):
                answer = self._call(
                    {**self._mine, "state": "released", "outcome": "failed, interrupted or killed"}, variables
                )
                self._remove_tmp_path(self._connection._shell.tmpdir, force=True)
                if "released" in answer:
                    break
            if time.monotonic() >= given_up:
                break
            time.sleep(RENEW_SECONDS)
        shutil.rmtree(constants.DEFAULT_LOCAL_TMP, ignore_errors=True)

    def _lives(self, main: int) -> bool:
        """Wait for the next renewal; false as soon as the run has ended."""
        if this_run.started(main) != self._mine["controller"]["started"]:
            return False
        try:
            descriptor = os.pidfd_open(main)
        except OSError:
            return False
        try:
            ended, _, _ = select.select([descriptor], [], [], RENEW_SECONDS)
        finally:
            os.close(descriptor)
        return not ended


def _doing() -> str:
    try:
        return this_run.doing_file().read_text()
    except OSError:
        return ""
