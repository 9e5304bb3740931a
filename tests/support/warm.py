"""Imported by the fork server: what every process would find anew, and each finds alike."""

from shodh.train.preflight import sources

sources()
