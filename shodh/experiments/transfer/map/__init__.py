"""A map of negative transfer: number of regimes by size of the model, on data that are fresh at every step.

A study file of kind ``map`` (`settings.MapConfig`) spans it; `runs.expand` lists its runs, `learner.Learner` is one of
them under way, `worker` trains those of a group side by side on one stream of data, `results` and `report` conclude.
The models, routers, balance terms, schedule and optimiser are those of every run; one device needs no DeepSpeed.
"""
