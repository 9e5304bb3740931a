"""Studies of negative transfer: runs that differ in one thing at a time, and whether sparse routing helps.

A study file (`StudyConfig`) names a base run, mixes of regimes and axes; `runs.expand` makes runs of it,
`measure.measure` measures one, and `report.write_study_report` answers.
"""
