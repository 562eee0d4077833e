"""Failures that belong to the command line itself."""

from __future__ import annotations

from identity_broker.errors import BrokerError, Kind


class UsageRefused(BrokerError):
    """The command cannot be carried out as it was written."""

    kind = Kind.INVALID
    reason = "USAGE"
    sentence = "the command cannot be carried out as written"


class NoBrokerNamed(BrokerError):
    """Nothing says which broker is meant."""

    kind = Kind.INVALID
    reason = "NO_BROKER_NAMED"
    sentence = "no broker was named, and none runs in ./.dev"
    default_hint = "name one with --dir DIR or --socket PATH, or start one: idb dev"


class NoAgentNamed(BrokerError):
    """Nothing says which node agent is meant."""

    kind = Kind.INVALID
    reason = "NO_AGENT_NAMED"
    sentence = "no node agent was named, and none is where one would be"
    default_hint = (
        "name its admin socket with --socket PATH, or the idb dev that runs it with --dir DIR"
    )


class FileUnusable(BrokerError):
    """A file named on the command line cannot be read, written or understood."""

    kind = Kind.INVALID
    reason = "FILE_UNREADABLE"
    sentence = "a file cannot be used"


class DirectoryExposed(FileUnusable):
    """Another user than root could change what is written to a directory."""

    reason = "DIRECTORY_EXPOSED"


class FileMalformed(FileUnusable):
    """A file was read and does not hold what it should."""

    reason = "FILE_MALFORMED"


class VerdictNegative(BrokerError):
    """A check the command was asked to make came out negative; the answer is on stdout."""

    kind = Kind.DENIED
    reason = "CHECK_FAILED"
    sentence = "the check came out negative"


class NotApplied(BrokerError):
    """`--wait` ended before every agent concerned had applied the change, which is stored."""

    kind = Kind.DEADLINE
    reason = "NOT_APPLIED_IN_TIME"
    sentence = "the change is stored, and not every agent has applied it in time"
    default_hint = "idb agent status, on the machine of the agent, says what it waits for"


class NotAcknowledged(BrokerError):
    """`idb revoke status` ended before everybody had heard of a revocation that is in force."""

    kind = Kind.DEADLINE
    reason = "NOT_ACKNOWLEDGED_IN_TIME"
    sentence = "it is revoked, and not every connected verifier has acknowledged it in time"
    default_hint = "idb agent status, on the verifier's machine, says what its agent waits for"


class NotReady(BrokerError):
    """`idb doctor` found something that keeps the broker from working."""

    kind = Kind.UNAVAILABLE
    reason = "DOCTOR_FOUND_FAILURES"
    sentence = "something keeps the broker from working"


class HookFailed(BrokerError):
    """A program that was to be told of a change did not end well."""

    kind = Kind.UNAVAILABLE
    reason = "HOOK_FAILED"
    sentence = "the command to run after a change failed"
