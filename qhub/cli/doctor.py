"""``qhub doctor``: whether qhub and its plugins can work on this machine, and what to change where they cannot."""

from __future__ import annotations

import typer

from qhub.cli.output import Json, emit, table, working
from qhub.reports import Finding

__all__ = ["doctor"]


def doctor(as_json: Json = False) -> None:
    """Check versions, devices, settings and every installed plugin, and say what to change.

    Statuses: ok; note (works, could be better); warning (something will not
    work); error (qhub or a plugin cannot work). Exit code 1 with an error.

    \b
    Examples:
      qhub doctor
      qhub doctor --json
    """
    with working():
        from qhub.cli.checks import all_findings

        findings = all_findings()
    statuses = [finding.status for finding in findings]
    errors = statuses.count("error")
    emit(
        as_json,
        {"findings": findings, "errors": errors},
        table("", ["", "about", "found", "to do"], [_cells(finding) for finding in findings]),
        f"errors: {errors}, warnings: {statuses.count('warning')}, notes: {statuses.count('note')}",
    )
    if errors:
        raise typer.Exit(1)


def _cells(finding: Finding) -> list[str]:
    return [finding.status, finding.subject, finding.message, finding.remedy or ""]
