"""What a reader of the paper need not read: pipelines, weights in memory, processes, flags, the record of a run, checkpoints,
prompts, reward models, pictures and the page."""
