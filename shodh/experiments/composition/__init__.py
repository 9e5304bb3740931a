"""Studies of composition: one anchor and two experts of a family a seed, and every way to a model between and beyond.

A study file (`CCMConfig`) names a family of flows with one parameter; `run_study` makes its data, trains anchor and
experts and evaluates the methods, seed by seed, and the report compares them.
"""
