"""The step for real: model, layers and optimizer of a plan, data, the loop.

Imports torch at module level.
"""
