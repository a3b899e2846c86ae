"""Where the time goes and how the machine fares: the clock, telemetry, the profiler's trace."""
