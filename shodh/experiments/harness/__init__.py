"""One engine for every study: runs as plain processes, a resumable runner, one tidy table of results, one command line.

A study says which runs to make (`run.Run`), what to measure of each (a function that the run names), and what to
conclude; `runner.run_all` makes the runs, `results.read_results` gathers what they left behind.
"""
