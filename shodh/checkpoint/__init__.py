"""Checkpoints of a run: ``model.safetensors`` (float32), fragments of the optimiser's state, and a manifest of both.

No file holds a pickle, and none knows the ranks, the expert-parallel degree or the ZeRO stage that wrote it.
"""
