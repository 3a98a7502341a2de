"""diffusers pipelines: loading, sampling, prompts and images."""
