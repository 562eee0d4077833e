"""Writes the reference pages in docs/reference/: what code knows is not written by hand.

- A page is made from the module that owns the facts; the module does no formatting of its own
  unless the facts are its alone.
- `--out DIR` writes elsewhere: tests/architecture/test_docs.py compares.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from identity_broker import errors

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"


def _table(*rows: tuple[str, ...]) -> Iterator[str]:
    head, *body = rows
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


def _page(title: str, source: str, *paragraphs: str) -> list[str]:
    lines = [f"# {title}", "", f"Generated from `{source}` by `make docs`; do not edit.", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    return lines


def _leaves(error: type[errors.BrokerError]) -> Iterator[type[errors.BrokerError]]:
    children = error.__subclasses__()
    if not children:
        yield error
    for child in children:
        yield from _leaves(child)


def _first_sentence(documented: type) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


def error_page() -> str:
    """Every reason, what the caller reads, what to do next, how it reaches gRPC and the shell."""
    from identity_broker.cli.exit_codes import BY_KIND
    from identity_broker.server.rpc.status import status_code

    lines = _page(
        "Reasons",
        "identity_broker/errors.py",
        "Every refusal carries a stable reason (`google.rpc.ErrorInfo`, domain "
        "`identity-broker`), one sentence, and a hint where there is a next step. `idb` prints "
        "all three and ends with the exit code below.",
    )
    for family in errors.BrokerError.__subclasses__():
        lines += [f"## {_first_sentence(family)}", ""]
        rows = [("reason", "when", "says", "hint", "gRPC", "exit")]
        for leaf in _leaves(family):
            code = "–" if leaf is errors.ConfigError else status_code(leaf()).name
            exit_code = str(int(BY_KIND[leaf.kind])) if leaf.kind in BY_KIND else "–"
            hint = leaf.default_hint or "–"
            rows.append(
                (f"`{leaf.reason}`", _first_sentence(leaf), leaf.sentence, hint, code, exit_code)
            )
        lines += [*_table(*rows), ""]
    lines += ["What the exit codes mean: [the command line](cli.md#exit-codes)."]
    return "\n".join(lines) + "\n"


def method_page() -> str:
    """The method table."""
    from identity_broker.server.rpc.methods import METHODS

    lines = _page(
        "Methods",
        "identity_broker/server/rpc/methods.py",
        "Who may call what, how long it may take, which budget it draws on, what is audited, and "
        "whether a retry leaves the same state. A method without a row is refused. Requests, "
        "answers and reasons are described in the `.proto` files below `protos/`.",
    )
    rows = [("method", "callers", "deadline", "budget", "audit", "idempotent")]
    for method, row in METHODS.items():
        rows.append(
            (
                f"`{method.removeprefix('/').removeprefix('identity_api.broker.v1.')}`",
                ", ".join(sorted(caller.value for caller in row.callers)),
                f"{row.deadline.total_seconds():g} s" if row.deadline else "stream",
                row.rate.value if row.rate else "–",
                row.audit.value,
                "yes" if row.idempotent else "no",
            )
        )
    return "\n".join([*lines, *_table(*rows)]) + "\n"


def telemetry_page() -> str:
    """Every metric and every log field."""
    from prometheus_client import CollectorRegistry

    from identity_broker.telemetry.fields import FIELDS
    from identity_broker.telemetry.metrics import Metrics

    lines = _page(
        "Telemetry",
        "identity_broker/telemetry/",
        "Metrics are at `/metrics` of `server.http_address`. Labels have closed sets of values: "
        "never a SPIFFE ID, never an address.",
    )
    metrics = Metrics(CollectorRegistry())
    suffixes = {"counter": "_total", "info": "_info"}
    rows = [("metric", "type", "labels", "meaning")]
    for metric in vars(metrics).values():
        described = getattr(metric, "describe", None)
        if described is None or isinstance(metric, CollectorRegistry):
            continue
        # Ours say `label_names`; prometheus_client has no public way to ask.
        names = getattr(metric, "label_names", None) or getattr(metric, "_labelnames", ())
        labels = ", ".join(f"`{label}`" for label in names) or "–"
        rows += [
            (
                f"`{family.name.removesuffix('_total')}{suffixes.get(family.type, '')}`",
                family.type,
                labels,
                family.documentation,
            )
            for family in described()
        ]
    lines += [*_table(*rows), "", "## Log fields", ""]
    lines += [
        "One JSON object a line. The event is a constant; facts stand in fields, and there are no "
        "others than these.",
        "",
    ]
    lines += _table(("field", "meaning"), *((f"`{name}`", text) for name, text in FIELDS.items()))
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Every setting."""
    from identity_broker.config.reference import reference_markdown

    return reference_markdown()


def cli_page() -> str:
    """Every command; the page is made where the commands are."""
    page: str = importlib.import_module("identity_broker.cli.reference").reference_markdown()
    return page


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page,
    "errors.md": error_page,
    "methods.md": method_page,
    "telemetry.md": telemetry_page,
}
if importlib.util.find_spec("identity_broker.cli.reference"):
    PAGES["cli.md"] = cli_page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the reference pages.")
    parser.add_argument("--out", type=Path, default=REFERENCE, help="where (default: docs/)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")
