"""Studies: a grid of runs that differ in one thing at a time, and one report of them all.

A study file (`StudyConfig`) names a base run, mixes of regimes and axes; `expand` makes cells of it, `run_cells` trains
and measures them, each in a run folder of its own, and `write_report` compares what they left behind.
"""
