"""`stepladder.core.verify`: the endpoint's checks, run on the controller; documented in plugins/modules/verify.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleActionSkip
from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

try:
    from pydantic import BaseModel, ValidationError

    from stepladder.verify import CheckResult, Expectations, Report, Target, format_line, format_table, run_checks
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "base_url": {"type": "str", "required": True},
    "served_name": {"type": "str", "required": True},
    "reasoning": {"type": "bool", "required": True},
    "tool_calls": {"type": "bool", "required": True},
    # Names the file that holds the key; Ansible's check of names takes it for the key.
    "api_key_file": {"type": "path", "no_log": False},
    "exact": {
        "type": "dict",
        "options": {
            "answer": {"type": "str", "required": True},
            "reasoning": {"type": "str"},
            "tool_reasoning": {"type": "str"},
            "tool_name": {"type": "str"},
            "tool_arguments": {"type": "dict"},
        },
    },
    "sense": {"type": "bool", "default": True},
    "rejects_unknown_model": {"type": "bool", "default": True},
    "max_tokens": {"type": "int", "default": 512},
    "request_timeout": {"type": "float", "default": 120.0},
    "deadline": {"type": "float", "default": 600.0},
    "report_file": {"type": "path"},
}

# A check that takes longer is shown when it is done.
SLOW_SECONDS = 2.0

_Model = TypeVar("_Model", bound="BaseModel")


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        if MISSING:
            raise AnsibleActionFail(f"{MISSING}: run the playbook by bin/stepladder, which makes its environment")
        if self._task.check_mode:
            raise AnsibleActionSkip(f"check mode: no request is made to {args['base_url']}")
        args["api_key"] = _read_key(args["api_key_file"])
        wrong: list[str] = []
        target, expectations = _read_model(Target, args, wrong), _read_model(Expectations, args, wrong)
        if target is None or expectations is None:
            raise AnsibleActionFail("; ".join(wrong))

        report = run_checks(target, expectations, _show, deadline=args["deadline"])
        show(format_table(report))
        problems = [] if report.passed else [_failure(report)]
        problems += _write_report(report, args["report_file"])
        result.update(changed=False, report=report.to_dict())
        if problems:
            result.update(failed=True, msg="\n".join(problems))
        return result


def _read_model(model: type[_Model], args: dict[str, Any], wrong: list[str]) -> _Model | None:
    """The model's fields from the task's arguments; adds to `wrong` what does not fit."""
    try:
        return model.model_validate({name: args[name] for name in model.model_fields})
    except ValidationError as error:
        # Without the input: a wrong base_url may hold a password.
        for item in error.errors(include_input=False):
            wrong.append(f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}")
        return None


def _read_key(file: str | None) -> str:
    if file is None:
        return "EMPTY"
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        # Ansible would add the cause's text once more.
        cause = getattr(error, "strerror", None) or str(error)
        raise AnsibleActionFail(f"api_key_file {file}: {cause}: name a readable file on the controller") from None
    if not key:
        raise AnsibleActionFail(f"api_key_file {file} is empty: write the key into it, or leave the argument out")
    return key


def _write_report(report: Report, file: str | None) -> list[str]:
    """Write it whole or not at all; what went wrong, for a report must not be lost with its file."""
    if file is None:
        return []
    path = Path(file)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(report.to_json(), encoding="utf-8")
        half.replace(path)
    except OSError as error:
        return [f"report_file {file}: {error.strerror}: name a writable place on the controller"]
    return []


def _show(check: CheckResult) -> None:
    """Show a check that was slow as soon as it is done; the table at the end has them all."""
    if check.seconds < SLOW_SECONDS:
        return
    color = constants.COLOR_OK if check.passed else constants.COLOR_ERROR if check.ran else constants.COLOR_WARN
    show(format_line(check), color)


def _failure(report: Report) -> str:
    lines = [f"{report.model} at {report.endpoint}:"]
    lines += [
        f"{check.name} failed: {check.detail}; expected: {check.expected}"
        for check in report.checks
        if check.name in report.failed
    ]
    if report.not_run:
        lines.append(f"not run: {', '.join(report.not_run)}")
    return "\n".join(lines)
