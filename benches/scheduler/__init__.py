"""Decisions from Python beside Dynamo's, in one run."""
