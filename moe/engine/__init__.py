"""One step after another: requests, scheduler, runner, sampler, and how they are put together."""
