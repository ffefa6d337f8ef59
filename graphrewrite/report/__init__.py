"""Text, JSON, SVG and HTML output."""
