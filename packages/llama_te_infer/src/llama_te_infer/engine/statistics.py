"""What an engine counts, and when its requests began and ended. All of it is plain data.

Times are seconds of `time.monotonic()`, which all processes of a machine share on Linux.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

# The upper bounds of vLLM's histograms, so that its dashboards fit.
INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Histogram:
    """Counts values by size. Each kind of histogram has its bounds, so they are not sent between processes.

    Attributes:
        bounds: The largest value of each bucket, in ascending order.
        total: The sum of the values.
        counts: The number of values in each bucket; the last bucket has the values above all bounds.
    """

    bounds: ClassVar[tuple[float, ...]] = ()
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, count: int = 1) -> None:
        """Count a value so many times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def copy(self) -> Self:
        """Return a histogram that does not change any more."""
        return type(self)(self.total, list(self.counts))


class StepTokens(Histogram):
    """Tokens of steps."""

    bounds = STEP_TOKENS


class FirstTokenSeconds(Histogram):
    """Seconds before first tokens."""

    bounds = FIRST_TOKEN_SECONDS


class InterTokenSeconds(Histogram):
    """Seconds between tokens."""

    bounds = INTER_TOKEN_SECONDS


@dataclass
class Counters:
    """What an engine has counted since it was made.

    Attributes:
        prompt_tokens: Tokens of prompts that have got their first token, cached tokens included.
        generation_tokens: Tokens written.
        prefix_cache_queries: Tokens of prompts that were looked up in the prefix cache, each prompt once.
        prefix_cache_hits: Tokens that the prefix cache had.
        num_preemptions: How often running sequences gave their pages back, to be computed again later.
        step_tokens: Tokens of each step: parts of prompts that it reads, and tokens that it chooses.
        time_to_first_token_seconds: Seconds from a request's arrival to its first token.
        inter_token_seconds: Seconds between two tokens of a completion.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    step_tokens: StepTokens = field(default_factory=StepTokens)
    time_to_first_token_seconds: FirstTokenSeconds = field(default_factory=FirstTokenSeconds)
    inter_token_seconds: InterTokenSeconds = field(default_factory=InterTokenSeconds)

    def add_tokens(self, now: float, before: Sequence[float | None]) -> None:
        """Count tokens that have arrived together.

        Args:
            now: When they arrived.
            before: For each of them, when the token before it arrived; `None` for the first one of a completion. The
                tokens of a beam arrive all at once and have no intervals.
        """
        self.generation_tokens += len(before)
        for time, count in Counter(before).items():
            if time is not None and time != now:
                self.inter_token_seconds.add(now - time, count)

    def copy(self) -> Counters:
        """Return counters that do not change any more."""
        return Counters(
            self.prompt_tokens,
            self.generation_tokens,
            self.prefix_cache_queries,
            self.prefix_cache_hits,
            self.num_preemptions,
            self.step_tokens.copy(),
            self.time_to_first_token_seconds.copy(),
            self.inter_token_seconds.copy(),
        )


@dataclass(frozen=True)
class EngineStats:
    """The load of an engine at a moment, and its counters.

    Attributes:
        num_requests_running: Sequences that have a place in the running batch or a prompt that is being read. The
            completions of a request count one by one as soon as its prompt is read; the beams of a search are one.
        num_requests_waiting: Requests in the queue, and preempted sequences.
        num_pages_used: Pages of the cache that running sequences hold.
        total_num_pages: Pages of the cache.
        page_size: Tokens of a page.
        prefix_caching: Whether prompts with the prefix of an earlier text reuse its pages.
        kv_cache_dtype: As the engine was made.
        counters: Since the engine was made.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_pages_used: int
    total_num_pages: int
    page_size: int
    prefix_caching: bool
    kv_cache_dtype: str
    counters: Counters

    @property
    def kv_cache_usage(self) -> float:
        """The share of the cache that running sequences hold; prefixes without a sequence are free to be replaced."""
        return self.num_pages_used / self.total_num_pages


@dataclass(frozen=True)
class RequestTimes:
    """When a request passed its stages.

    Attributes:
        arrival: It was submitted.
        scheduled: A step was planned that reads the beginning of its prompt.
        first_token: The host has read its first token; for beams, which have no tokens before their end, their end.
        last_token: Likewise for the last one.
    """

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def queue(self) -> float | None:
        """Seconds in the queue; `None` if the request has not left it."""
        return _between(self.arrival, self.scheduled)

    @property
    def prefill(self) -> float | None:
        """Seconds from the queue to the first token."""
        return _between(self.scheduled, self.first_token)

    @property
    def decode(self) -> float | None:
        """Seconds from the first token to the last one."""
        return _between(self.first_token, self.last_token)

    @property
    def inference(self) -> float | None:
        """Seconds from the queue to the last token."""
        return _between(self.scheduled, self.last_token)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the arrival to the first token."""
        return _between(self.arrival, self.first_token)

    @property
    def e2e(self) -> float | None:
        """Seconds from the arrival to the last token."""
        return _between(self.arrival, self.last_token)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin
