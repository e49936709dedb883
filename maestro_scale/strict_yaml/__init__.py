"""YAML documents as users write them: merged from files, ``--set`` and the environment, and strictly validated.

Recipes, studies and descriptions of datasets share this; each has its own pydantic models.
"""
