"""Number formats: which values exist, their codes, and how codes are packed into bytes."""
