"""Results beside the published tables, as HTML and Markdown."""
