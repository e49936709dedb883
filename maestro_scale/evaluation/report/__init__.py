"""Results next to the published tables, as HTML and Markdown."""
