"""What `idb dev` and `idb demo` fail with."""

from __future__ import annotations

from identity_broker.errors import BrokerError, Kind


class DevRunning(BrokerError):
    """Another `idb dev` holds the directory."""

    kind = Kind.CONFLICT
    reason = "DEV_ALREADY_RUNNING"
    sentence = "an idb dev already runs in this directory"


class DevNotRunning(BrokerError):
    """No `idb dev` runs in the directory."""

    kind = Kind.UNAVAILABLE
    reason = "DEV_NOT_RUNNING"
    sentence = "no idb dev runs in this directory"


class DevDirectoryUnusable(BrokerError):
    """The directory cannot be used, or holds something else."""

    kind = Kind.INVALID
    reason = "DEV_DIRECTORY_UNUSABLE"
    sentence = "the directory cannot be used"


class DevChildEnded(BrokerError):
    """The broker or OpenBao ended by itself; the other one was stopped too."""

    kind = Kind.UNAVAILABLE
    reason = "DEV_CHILD_ENDED"
    sentence = "a part of idb dev ended unexpectedly"


class DemoStepFailed(BrokerError):
    """A step of the demonstration did not hold."""

    kind = Kind.UNAVAILABLE
    reason = "DEMO_STEP_FAILED"
    sentence = "a step of the demonstration did not hold"
