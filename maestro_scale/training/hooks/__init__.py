"""What happens between steps: logging, pictures, records of skipped steps, garbage collection."""
