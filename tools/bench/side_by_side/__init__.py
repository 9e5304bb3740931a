"""Parts of ``tools/bench/peers.py``: data sets, models, one training for all of them, and the page."""
