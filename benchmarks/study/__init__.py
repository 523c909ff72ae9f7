"""The study: `python -m benchmarks.study TABLE`, see README.md beside this file."""
