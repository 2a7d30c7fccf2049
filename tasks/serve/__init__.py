"""Verbs of a model in use: keep it as a version, judge images with it, hand it on."""
