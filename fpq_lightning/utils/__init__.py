"""Files, processes, memory, resources and registries: tools for every room."""
