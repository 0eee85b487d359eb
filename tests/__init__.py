"""Tests: `unit` mirrors the package; `integration`, `simulation`, `faults` and `slow` run whole jobs."""
