"""The small engine: one sequence a step on the model of `yuan2_model`; ready in seconds."""
