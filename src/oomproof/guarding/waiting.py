"""Waiting for memory or a device to come back: longer and longer, by chance, a minute in all."""

from __future__ import annotations

from collections.abc import Callable

from oomproof.faults.fault import FaultClass
from oomproof.guarding.situation import Failure

MAX_WAIT_S = 60.0
"""All the waiting together."""
_FIRST_S = 0.5
_LONGEST_S = 16.0
_MAX_ATTEMPTS = 16


def retry_after_waiting(
    attempt: Callable[[], Failure | None],
    *,
    tell: Callable[[float], None],
    sleep: Callable[[float], None],
) -> Failure | None:
    """Calls `attempt` until it does not fail for want of what others hold.

    Exponential backoff with full jitter (tenacity's wait_random_exponential). Failures are values:
    no exception, and so no tensor, is kept while it waits.

    Args:
        attempt: None where it succeeded.
        tell: Told of each wait, in seconds, before it begins.
        sleep: time.sleep or its like.

    Returns:
        The last failure; None where an attempt succeeded.
    """
    from tenacity import (
        RetryCallState,
        Retrying,
        retry_if_result,
        stop_after_attempt,
        stop_before_delay,
        wait_random_exponential,
    )

    def last(state: RetryCallState) -> Failure | None:
        failure: Failure | None = state.outcome.result() if state.outcome is not None else None
        return failure

    retrying = Retrying(
        wait=wait_random_exponential(multiplier=_FIRST_S, max=_LONGEST_S),
        stop=stop_before_delay(MAX_WAIT_S) | stop_after_attempt(_MAX_ATTEMPTS),
        retry=retry_if_result(_is_for_others),
        retry_error_callback=last,
        before_sleep=lambda state: tell(state.upcoming_sleep),
        sleep=sleep,
    )
    return retrying(attempt)


def _is_for_others(failure: Failure | None) -> bool:
    return failure is not None and (
        failure.is_world or failure.fault.fault_class is FaultClass.WAIT
    )
