"""Jobs on behalf of tabs: looked at until they end, and cancelled when their tab goes away."""

import asyncio
import time
from collections.abc import AsyncGenerator

from app.jobs import Job, Jobs
from app.ui.door import Presence
from composition import Request

LOOK = 0.1  # seconds between two looks at a job
GRACE = 5.0  # seconds that a client may be away before its job is cancelled


class Maker:
    """Makes pictures for tabs through the one line of jobs."""

    def __init__(self, jobs: Jobs, presence: Presence) -> None:
        self.jobs, self._presence = jobs, presence

    def submit(self, request: Request, client: str) -> Job:
        """Put a request of this tab in line. Raises Refused."""
        return self.jobs.submit(request, client)

    async def looks(self, job: Job, client: str) -> AsyncGenerator[bool, None]:
        """Each time that the job should be looked at, whether it is over: the last look sees its end. It is cancelled when its client goes away, or nobody
        looks any more."""
        last, over = time.monotonic(), False
        try:
            while not over:
                if self._presence.here(client):
                    last = time.monotonic()
                elif time.monotonic() - last > GRACE:
                    return
                over = job.finished.is_set()
                yield over
                if not over:
                    await asyncio.sleep(LOOK)
        finally:
            self.jobs.cancel(job.number)
