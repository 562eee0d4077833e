"""What the broker does on a schedule.

- One table of jobs. What is due is a query or a computation, never a stored job.
- A job that fails says so in the log and is tried again at its next turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from identity_broker.errors import BrokerError
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics

_log = get_logger("jobs")


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the table."""

    name: str
    every: timedelta
    run: Callable[[], Awaitable[object]]


class Jobs:
    """Runs the table until stopped."""

    def __init__(self, table: Sequence[Job], metrics: Metrics) -> None:
        self._table = table
        self._metrics = metrics
        self._scheduler = AsyncIOScheduler(timezone="UTC")

    def start(self) -> None:
        """Start every job at its own pace."""
        for job in self._table:
            self._scheduler.add_job(
                self._run,
                "interval",
                args=(job,),
                seconds=job.every.total_seconds(),
                jitter=min(2.0, job.every.total_seconds() / 10),
                id=job.name,
                coalesce=True,
                max_instances=1,
                misfire_grace_time=None,
            )
        self._scheduler.start()

    def stop(self) -> None:
        """Start no job any more."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    async def _run(self, job: Job) -> None:
        reason = "OK"
        try:
            await job.run()
        except BrokerError as error:
            reason = error.reason
            _log.warning("job failed", job=job.name, reason=reason, detail=error.detail)
        except Exception:  # noqa: BLE001  # a bug in one job must not end the others
            reason = "INTERNAL"
            _log.exception("job failed", job=job.name)
        self._metrics.job_total.labels(job.name, reason).inc()
