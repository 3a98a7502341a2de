"""Reports for people: tables and pictures."""
