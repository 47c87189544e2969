"""diffusers custom pipelines: stock pipelines whose call also takes adapters."""
