"""The structure of a network: its units, their order, and what each reads."""
