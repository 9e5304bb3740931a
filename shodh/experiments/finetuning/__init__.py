"""Fine-tuning of a trained run on a regime that it has not seen, from a few trajectories: settings, runs, report."""
