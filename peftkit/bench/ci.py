"""What the gate leaves for a CI system: JUnit XML, a Markdown summary, and annotations of GitHub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from peftkit.bench.gate import Verdict

COLUMNS = ("method", "check", "value", "baseline", "limit", "verdict", "why")
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that no XML file may hold


def rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """One row per verdict, in the order of COLUMNS."""
    return [[v.name, v.check, *v.numbers(), "pass" if v.passed else "FAIL", v.words] for v in verdicts]


def headline(suite: str, verdicts: Sequence[Verdict]) -> str:
    """The outcome in one sentence."""
    failed = [v for v in verdicts if not v.passed]
    if not failed:
        return f"Gate of suite {suite}: all {len(verdicts)} checks pass."
    names = ", ".join(f"{v.name} ({v.check})" for v in failed)
    return f"Gate of suite {suite}: {len(failed)} of {len(verdicts)} checks FAIL: {names}."


def summary(suite: str, verdicts: Sequence[Verdict]) -> str:
    """GitHub-flavoured Markdown, failures first."""
    ordered = sorted(verdicts, key=lambda verdict: verdict.passed)
    table = [list(COLUMNS), ["---", "---", "---:", "---:", "---:", "---", "---"], *rows(ordered)]
    lines = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in table]
    return "\n".join([f"### {_cell(headline(suite, verdicts))}", "", *lines, ""])


def junit(suite: str, verdicts: Sequence[Verdict]) -> str:
    """JUnit XML, one test case per verdict: class name `suite.method`, name the check and its task."""
    failures = str(sum(not verdict.passed for verdict in verdicts))
    counts = {"tests": str(len(verdicts)), "failures": failures, "errors": "0", "time": "0"}
    root = ElementTree.Element("testsuites", {"name": "peftkit bench gate", **counts})
    block = ElementTree.SubElement(root, "testsuite", {"name": _xml(suite), **counts, "skipped": "0"})
    for v in verdicts:
        name = f"{v.check} on {v.task}" if v.task else v.check
        case = ElementTree.SubElement(block, "testcase", {"classname": _xml(f"{suite}.{v.method}"), "name": _xml(name), "time": "0"})
        if not v.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(v.words), "type": "regression"})
            value, baseline, limit = v.numbers()
            failure.text = _xml(f"{v.name}, {v.check}: {value}, baseline {baseline}, limit {limit}\n{v.words}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def github_annotations(suite: str, verdicts: Sequence[Verdict]) -> list[str]:
    """Workflow commands of GitHub, one error per failed check."""
    failed = [v for v in verdicts if not v.passed]
    return [f"::error title={_escaped(f'{suite}: {v.name}, {v.check}', ':,')}::{_escaped(v.words)}" for v in failed]


def append(path: Path, text: str) -> None:
    """Adds to a file that other steps of a CI job may have written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def _xml(text: str) -> str:
    return NOT_XML.sub("?", text)


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
