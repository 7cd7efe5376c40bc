"""Benchmarks, protocols and metrics; results, submissions and pages."""
