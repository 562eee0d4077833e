"""One list of metrics, one list of log fields, and nobody beside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity_broker.telemetry.fields import FIELDS
from identity_broker.telemetry.metrics import Metrics

PACKAGE = Path(__file__).parents[2] / "identity_broker"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
LOGGERS = {"log", "_log", "logger", "_logger"}
CLOSED_LABELS = {"method", "reason", "kind", "name", "job", "attestor", "le", "outcome"}
_NOT_FIELDS = {"exc_info", "stack_info"}


def log_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LEVELS
        ):
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in LOGGERS:
                yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_log_lines_have_a_constant_event_and_declared_fields(path: Path) -> None:
    for call in log_calls(ast.parse(path.read_text("utf-8"))):
        where = f"{path.relative_to(PACKAGE)}:{call.lineno}"
        assert len(call.args) == 1, f"{where}: one positional argument, the event"
        event = call.args[0]
        assert isinstance(event, ast.Constant), f"{where}: the event must be a constant"
        assert isinstance(event.value, str), where
        assert event.value == event.value.strip().rstrip("."), f"{where}: no full stop"
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in _NOT_FIELDS:
                assert keyword.arg in FIELDS, (
                    f"{where}: {keyword.arg} is not in telemetry/fields.py"
                )


def test_the_scan_above_finds_the_pipeline_s_lines() -> None:
    found = [c for path in FILES for c in log_calls(ast.parse(path.read_text("utf-8")))]
    assert len(found) > 5


def test_metrics_are_declared_in_one_file() -> None:
    for path in FILES:
        if path.name in {"metrics.py", "loop_metrics.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
                module = getattr(node, "module", None) or ""
                assert not module.startswith("prometheus_client"), path
                assert "prometheus_client" not in names, path


def test_metric_names_and_labels_are_from_closed_sets() -> None:
    metrics = Metrics()
    declared = {name: metric for name, metric in vars(metrics).items() if name != "registry"}
    assert len(declared) >= 20
    for attribute, metric in declared.items():
        (family,) = metric.describe()
        names = {f"idb_{attribute}", f"idb_{attribute.removesuffix('_total')}"}
        names |= {f"idb_{attribute}_timestamp_seconds"}
        assert family.name in names
        assert family.documentation
        labels = getattr(metric, "label_names", None) or metric._labelnames
        assert set(labels) <= CLOSED_LABELS, attribute


def test_two_brokers_in_one_process_do_not_share_numbers() -> None:
    one, two = Metrics(), Metrics()
    one.issued_total.labels("x509").inc()
    assert b'idb_issued_total{kind="x509"} 1.0' in one.render()
    assert b'idb_issued_total{kind="x509"}' not in two.render()


def test_fields_have_a_meaning() -> None:
    assert all(FIELDS.values())
    assert not {"token", "secret", "password", "private_key", "csr"} & set(FIELDS)
